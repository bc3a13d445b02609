"""The name of the method in peft's registries."""


class _ScarPeftType(str):
    """Equal to, and hashed like, the plain string, with what readers of peft's own enumeration look at.

    peft's registries are dictionaries keyed by members of a string enumeration, so a string of one's own fits in; the
    enumeration itself cannot be extended from outside.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        return str.__str__(self)

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.name}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return (_ScarPeftType, (self.value,))


SCAR = _ScarPeftType("SCAR")
"""What `config.peft_type` is, and the key of the method in `peft.mapping`."""
