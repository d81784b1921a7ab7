"""What the list says of one name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A function, class or method of vLLM.

    Attributes:
        module, name: where it is defined (a class's method as `Class.method`).
        used_by: our modules in `microedit_vllm/engine`, separated by a blank.
        purpose: what for.
        parameters: of a function, without self and cls, with the stars; None for a class.
        attributes: of a class: what we read, write or call of its objects.
    """

    module: str
    name: str
    used_by: str
    purpose: str
    parameters: tuple[str, ...] | None = None
    attributes: tuple[str, ...] = ()

    @property
    def runner(self) -> str | None:
        """The model runner that the name belongs to, "v1" or "v2"; None for both."""
        return {"runner_v1": "v1", "runner_v2": "v2"}.get(self.used_by)


def function(place: str, parameters: str, used_by: str, purpose: str) -> PrivateName:
    module, name = place.split(":")
    return PrivateName(module, name, used_by, purpose, tuple(parameters.split()))


def named(place: str, attributes: str, used_by: str, purpose: str) -> PrivateName:
    module, name = place.split(":")
    return PrivateName(module, name, used_by, purpose, None, tuple(attributes.split()))
