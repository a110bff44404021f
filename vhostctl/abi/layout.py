"""A ctypes base class that refuses what plain `ctypes.Structure` lets through.

Without it a misspelt field becomes a new attribute, and 70000 stored into a ``__u16``
becomes 4464: the kernel is then asked for something that nobody wrote.
"""

from __future__ import annotations

import ctypes

from vhostctl.errors import InvalidArgument

_UNSIGNED = (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64)
_SIGNED = (ctypes.c_int8, ctypes.c_int16, ctypes.c_int32, ctypes.c_int64)

_RANGES: dict[type, range] = {kind: range(2 ** (8 * ctypes.sizeof(kind))) for kind in _UNSIGNED} | {
    kind: range(-(2 ** (8 * ctypes.sizeof(kind) - 1)), 2 ** (8 * ctypes.sizeof(kind) - 1))
    for kind in _SIGNED
}


def members(kind: type) -> dict[str, type]:
    """Return field name -> ctypes type of the Structure or Union `kind`, in header order.

    Fields of anonymous members appear under their own names, as in C. A name that begins
    with an underscore stands for bytes that have no name in the header.
    """
    found: dict[str, type] = {}
    for cls in reversed(kind.__mro__):
        anonymous = vars(cls).get("_anonymous_", ())
        for name, field, *_ in vars(cls).get("_fields_", ()):
            found |= members(field) if name in anonymous else {name: field}
    return found


class Struct(ctypes.Structure):
    """Base of every mirrored struct: unknown names and values that do not fit are errors.

    The check covers construction and assignment of whole fields. Elements of an array
    field (``table.features[0] = ...``) are stored by ctypes itself, unchecked.

    Integers are in the byte order of the host, like the kernel's own; a virtio device
    that has acknowledged VIRTIO_F_VERSION_1 is little-endian everywhere.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Demand ``__slots__``: without it instances get a __dict__ that swallows misspellings."""
        super().__init_subclass__()
        if "__slots__" not in vars(cls):
            raise TypeError(f"{cls.__name__} needs __slots__ = ()")

    def __init__(self, *values: object, **fields: object) -> None:
        """Set fields by position or by name; the rest is zero.

        Raises InvalidArgument for an unknown name or a value that does not fit.
        """
        known = members(type(self))
        for name in fields:
            if name not in known:
                raise InvalidArgument(
                    f"struct {type(self).__name__} has no field {name!r}",
                    hint=f"its fields are {', '.join(known)}",
                )
        if len(values) > len(known):
            raise InvalidArgument(
                f"struct {type(self).__name__} has {len(known)} fields, not {len(values)}"
            )
        super().__init__(*values, **fields)

    def __setattr__(self, name: str, value: object) -> None:
        """Store `value`, or raise InvalidArgument and store nothing if it does not fit."""
        limits = _RANGES.get(members(type(self)).get(name, object))
        if limits is not None and isinstance(value, int) and value not in limits:
            raise InvalidArgument(
                f"struct {type(self).__name__}: {name} = {value} does not fit"
                f" {limits.start}..{limits.stop - 1}"
            )
        try:
            super().__setattr__(name, value)
        except ValueError as error:  # bytes too long for a char array
            raise InvalidArgument(f"struct {type(self).__name__}: {name}: {error}") from None

    def __repr__(self) -> str:
        """Return the struct with its values; those above 16 bits, mostly addresses, in hex."""
        shown: list[str] = []
        end = 0
        for name, kind in members(type(self)).items():
            offset = getattr(type(self), name).offset
            if offset < end or name.startswith("_"):
                continue  # another view of bytes that were shown already, or nameless ones
            end = offset + ctypes.sizeof(kind)
            shown.append(f"{name}={_text(getattr(self, name))}")
        return f"{type(self).__name__}({', '.join(shown)})"


def flexible(header: type[Struct], tail: str, count: int) -> type:
    """Return the struct `header` with `count` elements in its flexible array `tail`.

    The header mirrors a flexible array as one of length 0. The result is a subclass of it,
    with the same name, and its size includes the elements.
    """
    element = vars(members(header)[tail])["_type_"]
    body = {"__slots__": (), "_fields_": ((tail, element * count),)}
    metaclass: type = type(header)
    sized: type = metaclass(header.__name__, (header,), body)
    return sized


def _text(value: object) -> str:
    if isinstance(value, ctypes.Array):
        return f"[{', '.join(_text(element) for element in value)}]"
    if isinstance(value, int) and abs(value) >= 2**16:
        return hex(value)
    return repr(value)
