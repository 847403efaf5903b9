"""Text to tokens and back, with the special tokens that Hugging Face's tokenizers would add."""

import json
from array import array
from pathlib import Path
from typing import Any

from litgpt.tokenizer import Tokenizer

from whittle_nas.errors import ConfigError

# tokens kept from one sub-network to the next: 200 MB
MAX_CACHED_TOKENS = 50_000_000


class TextEncoder:
    """A litgpt tokenizer that treats special tokens as `transformers` does.

    `litgpt.Tokenizer.encode` decides about BOS by the name of the directory (Llama 3) and cuts off
    a closing EOS, so an exported model would be read differently from its source.

    Args:
        tokenizer: The tokenizer of the checkpoint.
        checkpoint_dir: Its directory.
    """

    def __init__(self, tokenizer: Tokenizer, checkpoint_dir: Path) -> None:
        self.tokenizer = tokenizer
        self.checkpoint_dir = checkpoint_dir
        self.settings = _read_json(checkpoint_dir / "tokenizer_config.json")
        self.generation = _read_json(checkpoint_dir / "generation_config.json")
        self._cache: dict[tuple[str, bool | None], array[int]] = {}
        self._num_cached = 0
        self._chat: Any = None

    @property
    def prefix_id(self) -> int:
        """Token that stands before a text without context: BOS, or else EOS, or else token 0."""
        tokenizer = self.tokenizer
        known = (i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None and i >= 0)
        return next(known, 0)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a generation, the tokenizer's own first."""
        listed = self.generation.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        return list(dict.fromkeys(i for i in [self.tokenizer.eos_id, *listed] if i is not None))

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Tokens of a text.

        Args:
            text: Any text.
            special: Add special tokens; None: as the tokenizer does by itself, unless the text
                begins with them.
        """
        key = (text, special)
        if (cached := self._cache.get(key)) is not None:
            return cached.tolist()
        ids = self._encode(text, special)
        if self._num_cached < MAX_CACHED_TOKENS:
            self._cache[key] = array("i", ids)
            self._num_cached += len(ids)
        return ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of tokens, as Hugging Face's tokenizer of the same directory gives it."""
        processor: Any = self.tokenizer.processor
        if self.tokenizer.backend != "huggingface":
            return processor.decode(ids)
        text = processor.decode(ids, skip_special_tokens=skip_special)
        if self.settings.get("clean_up_tokenization_spaces"):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.clean_up_tokenization(self, text)  # type: ignore[arg-type]
        return text

    def chat_template(self, name: bool | str = True) -> str:
        """The checkpoint's chat template: the default one, or one of several by name."""
        return self._chat_tokenizer().get_chat_template(name if isinstance(name, str) else None)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        name: str | None = None,
    ) -> str:
        """A conversation as one prompt.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            add_generation_prompt: End with the beginning of an answer; otherwise the last message
                stays open.
            name: Which of several templates.
        """
        from jinja2 import TemplateError

        tokenizer = self._chat_tokenizer()
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            "chat_template": name,
        }
        try:
            return tokenizer.apply_chat_template(messages, **options)
        except TemplateError:  # some templates know no system role: lm-eval leaves it out, too
            messages = [m for m in messages if m["role"] != "system"]
            return tokenizer.apply_chat_template(messages, **options)

    def _chat_tokenizer(self) -> Any:
        """Hugging Face's own tokenizer, which alone knows how to fill in a chat template."""
        if self._chat is None:
            from transformers import AutoTokenizer

            self._chat = AutoTokenizer.from_pretrained(self.checkpoint_dir)
            if not self._chat.chat_template:
                raise ConfigError(
                    f"apply_chat_template: {self.checkpoint_dir} has no chat template "
                    "(chat_template in tokenizer_config.json, or chat_template.jinja)"
                )
        return self._chat

    def _encode(self, text: str, special: bool | None) -> list[int]:
        if special is None:
            special = not self._begins_with_prefix(text)
        processor: Any = self.tokenizer.processor
        if self.tokenizer.backend != "huggingface":
            ids: list[int] = processor.encode(text)
            bos = self.tokenizer.bos_id
            return [bos, *ids] if special and self.tokenizer.use_bos and bos is not None else ids
        ids = processor.encode(text, add_special_tokens=special).ids
        return self._with_bos(ids) if special else ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Where `add_bos_token` is set it decides, whatever tokenizer.json adds."""
        wanted, bos = self.settings.get("add_bos_token"), self.tokenizer.bos_id
        if wanted is None or bos is None:
            return ids
        if wanted:
            return ids if ids[:1] == [bos] else [bos, *ids]
        return ids[1:] if ids[:1] == [bos] else ids

    def _begins_with_prefix(self, text: str) -> bool:
        if self.tokenizer.bos_id is None and self.tokenizer.eos_id is None:
            return False
        prefix = self.decode([self.prefix_id], skip_special=False)
        return bool(prefix) and text.startswith(prefix)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # litgpt repairs or ignores these; so do we
        return {}
