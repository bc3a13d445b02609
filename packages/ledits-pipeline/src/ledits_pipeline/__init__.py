from . import adapter_sd as adapter_sd
from . import adapter_sdxl as adapter_sdxl
from .adapters import FamilyAdapter as FamilyAdapter
from .adapters import register_adapter as register_adapter
from .inversion import LEditsInversion as LEditsInversion
from .output import LEditsOutput as LEditsOutput
from .pipeline import LEditsPipeline as LEditsPipeline
