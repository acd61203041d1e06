"""A language model behind any OpenAI-compatible endpoint, asked one question at a time.

Invariant: its key goes to that endpoint alone, never into a message, a log or a file.
"""

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from lightning_ray.algorithms.prompt_config import ReflectionConfig
from lightning_ray.errors import InfrastructureError, UserError

TRIES = 3
_KNOCK_S = 10.0
_AGAIN = (408, 409, 429, 500, 502, 503, 504)


class LanguageModel:
    """Answers prompts; made where the job is started."""

    def __init__(self, config: ReflectionConfig):
        """Raises UserError when the key is not set."""
        self._config = config
        self._base = config.base_url.rstrip("/")
        self._headers = {"content-type": "application/json", "user-agent": "lightning-ray"}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise UserError(
                    f"prompt.reflection.api_key_env={config.api_key_env}: that environment "
                    "variable is not set; export the key of prompt.reflection.base_url in it"
                )
            self._headers["authorization"] = f"Bearer {key}"

    def knock(self) -> None:
        """Raises UserError when nothing answers at the endpoint, or it refuses the key."""
        request = urllib.request.Request(f"{self._base}/models", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_KNOCK_S):
                return
        except urllib.error.HTTPError as error:
            # Not every endpoint lists its models; this one is there.
            if error.code not in (401, 403):
                return
            raise UserError(
                f"prompt.reflection.base_url={self._base} refuses the key (HTTP {error.code}); "
                "name the environment variable that holds it in prompt.reflection.api_key_env"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"prompt.reflection.base_url={self._base}: no language model answers there "
                f"({_reason(error)})"
            ) from error

    def __call__(self, prompt: str) -> str:
        """The model's answer. Raises InfrastructureError after `TRIES` tries without one."""
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
        }
        for name in ("temperature", "max_tokens"):
            if (value := getattr(self._config, name)) is not None:
                body[name] = value
        reason = ""
        for number in range(TRIES):
            if number:
                time.sleep(2.0**number)
            try:
                return self._ask(json.dumps(body).encode())
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code not in _AGAIN:
                    break
            except (OSError, ValueError) as error:
                reason = _reason(error)
        raise InfrastructureError(
            f"the language model {self._config.model} at {self._base} gave no answer ({reason})"
        )

    def _ask(self, body: bytes) -> str:
        request = urllib.request.Request(f"{self._base}/chat/completions", body, self._headers)
        with urllib.request.urlopen(request, timeout=self._config.timeout_s) as reply:
            said = json.load(reply)
        try:
            text = said["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("the reply has no choices[0].message.content") from error
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the reply is empty")
        return text


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(error).__name__
