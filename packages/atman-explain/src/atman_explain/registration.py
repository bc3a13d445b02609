"""Tells transformers about the attention function "atman" and the task "explain", inseq about the method "atman"."""

import sys
from importlib import import_module


def register_attention() -> None:
    """Make `attn_implementation="atman"` known. Calling it again changes nothing."""
    from .remote.hook_atman import register_attention

    register_attention()


def register_pipeline() -> None:
    """Make `pipeline("explain")` known. Calling it again changes nothing."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from .remote.pipeline_atman import TASK, ExplainPipeline

    if "explain" not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            "explain", pipeline_class=ExplainPipeline, pt_model=TASK["pt"], type=TASK["type"]
        )


def register_inseq() -> None:
    """Make `inseq.load_model(model, "atman")` known. Calling it again changes nothing."""
    import_module(".integrations.inseq", __package__)


def register() -> None:
    """Register everything now, with inseq if it is in use.

    `import atman_explain` does this by itself as soon as transformers or inseq is; call it to see why it did not.

    Example:
        >>> import atman_explain
        >>> atman_explain.register()
    """
    register_attention()
    register_pipeline()
    if "inseq" in sys.modules:
        register_inseq()
