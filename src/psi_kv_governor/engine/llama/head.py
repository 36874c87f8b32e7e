"""The head of a chat: its system prompt with all that the chat template puts around it, in tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

_SYSTEM_ROLES = frozenset({"system", "developer"})

_log = logging.getLogger("psi_kv_governor")


class _RenderedError(Exception):
    """Carries the prompt out of a chat handler that was about to complete it."""

    def __init__(self, prompt: str | Sequence[int]) -> None:
        super().__init__("rendered")
        self.prompt = prompt


class _Renderer:
    """Stands in for the model: everything is the model's, but a completion is not begun."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: str | Sequence[int], **_: Any) -> None:
        raise _RenderedError(prompt)


def leading_system(messages: Sequence[Any]) -> list[Any]:
    """The messages before the first that is not the system's."""
    return list(itertools.takewhile(lambda message: message.get("role") in _SYSTEM_ROLES, messages))


def head_of_chat(llm: Any, handler: Callable[..., Any], system: Sequence[Any], **arguments: Any) -> list[int]:
    """The tokens with which every conversation under these `system` messages begins.

    Found by rendering two that differ in what the user says: what they have in common is the head. So it is
    right for every template, for one that brings a system prompt of its own as well. `arguments` are those
    that go into a template (tools, functions). Empty where the handler can't be asked.
    """
    try:
        one, other = (
            _rendered(llm, handler, [*system, {"role": "user", "content": said}], arguments)
            for said in ("a", "b")
        )
    except Exception as error:  # somebody's template or handler; the sinks are protected all the same
        _log.info("the system prompt is not known here, so only its first tokens are protected (%s)", error)
        return []
    return one[: llm.longest_token_prefix(one, other)]


def _rendered(
    llm: Any, handler: Callable[..., Any], messages: list[Any], arguments: dict[str, Any]
) -> list[int]:
    try:
        handler(llama=_Renderer(llm), messages=messages, **arguments)
    except _RenderedError as rendered:
        prompt = rendered.prompt
        if isinstance(prompt, str):
            return list(llm.tokenize(prompt.encode(), special=True))
        return list(prompt)
    raise ValueError("the chat handler completes nothing")
