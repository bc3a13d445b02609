"""Tells peft about the method "SCAR"."""


def register_method() -> None:
    """Make the method known to peft. Calling it again changes nothing.

    Raises:
        RuntimeError: another package has taken the name "SCAR".
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from .config import ScarConfig
    from .hub import register_push
    from .model import ScarModel
    from .peft_type import SCAR

    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(SCAR)
    if present is not None and present.__module__ != ScarConfig.__module__:
        raise RuntimeError(f'peft knows a method "SCAR" of {present.__module__} already; uninstall one of the two.')
    # `peft.utils.register_peft_method` takes the members of peft's own enumeration only.
    PEFT_TYPE_TO_CONFIG_MAPPING[SCAR] = ScarConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SCAR] = ScarModel
    PEFT_TYPE_TO_PREFIX_MAPPING[SCAR] = ScarModel.prefix
    register_push()


def register() -> None:
    """Register with peft now.

    `import scar_peft` does this by itself as soon as peft is in use; call it to see why it did not.

    Example:
        >>> import scar_peft
        >>> scar_peft.register()
    """
    register_method()
