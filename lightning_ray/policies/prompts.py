"""A prompt as a policy's version: what replaces an agent's own system prompt."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptVersion:
    """A prompt to be put in the place of the agent's own; immutable, as every version is."""

    name: str
    """The policy whose calls it is for."""
    version: int
    """0 is the agent's own prompt."""
    seed: str
    """The text of the agent's own system prompt that is replaced; it may be a part of the whole."""
    text: str
    demonstrations: tuple[tuple[str, str], ...] = ()
    """Exchanges (user, assistant) put before the agent's first message."""

    @property
    def label(self) -> str:
        """NAME@VERSION, as spans call it."""
        return f"{self.name}@{self.version}"
