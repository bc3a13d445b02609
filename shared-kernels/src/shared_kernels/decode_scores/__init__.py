from .eager import decode_scores_eager as decode_scores
from .eager import decode_topk_eager as decode_topk
