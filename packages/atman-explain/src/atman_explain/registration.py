"""Tells transformers about the attention function "atman" and the pipeline task "explain"."""


def register_attention() -> None:
    """Make `attn_implementation="atman"` known. Calling it again changes nothing."""
    from .remote.hook_atman import register_attention

    register_attention()


def register_pipeline() -> None:
    """Make `pipeline("explain")` known. Calling it again changes nothing."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.pipelines import PIPELINE_REGISTRY

    from .remote.pipeline_atman import ExplainPipeline

    if "explain" not in PIPELINE_REGISTRY.supported_tasks:
        models = (AutoModelForCausalLM, AutoModelForImageTextToText)
        PIPELINE_REGISTRY.register_pipeline("explain", pipeline_class=ExplainPipeline, pt_model=models, type="text")


def register() -> None:
    """Register everything now, and with inseq if it is installed.

    `import atman_explain` does this by itself as soon as transformers is in use; call it to see why it did not.

    Example:
        >>> import atman_explain
        >>> atman_explain.register()
    """
    register_attention()
    register_pipeline()
