"""A litgpt model as a model of the LM Evaluation Harness."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.batching import attempt, column_budget, halved
from whittle_nas.evaluate.encoding import TextEncoder
from whittle_nas.evaluate.generation import Decoding, generate
from whittle_nas.evaluate.packing import Query
from whittle_nas.evaluate.scoring import score
from whittle_nas.progress import bar

logger = logging.getLogger(__name__)

# what generation tasks may ask for; anything else would be ignored in silence
GENERATION_OPTIONS = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


class LitGPTHarness(TemplateLM):
    """Any litgpt model: a whole checkpoint, or a sub-network whose weights are views of one.

    Args:
        model: The model, in eval mode and on its device.
        encoder: The checkpoint's tokenizer.
        batch_size: Sequences of full length per batch; None: chosen for the device. Halved
            whenever the memory does not suffice.
        max_length: Tokens that the model may look at; None: all that it can.
        seed: Of sampled generations.
        show_progress: Draw progress bars on stderr.
    """

    def __init__(
        self,
        model: Any,
        encoder: TextEncoder,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        seed: int = 1337,
        show_progress: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder
        self.batch_size = batch_size
        self._max_length = max_length
        self.seed = seed
        self.show_progress = show_progress
        self._device = model.transformer.wte.weight.device

    @property
    def max_length(self) -> int:
        """Tokens that the model looks at."""
        return self._max_length or self.model.max_seq_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; where the tokenizer has none, the one that begins it."""
        return next(iter(self.encoder.eos_ids), self.encoder.prefix_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self.encoder.prefix_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's request cache."""
        return str(self.encoder.checkpoint_dir).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text; by default with the special tokens that the tokenizer adds itself."""
        return self.encoder.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses, for lm-eval's records."""
        return self.encoder.chat_template(chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one prompt, by the checkpoint's own chat template."""
        return self.encoder.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether greedy decoding gives them.

        A continuation without tokens is certain; lm-eval's own code fails where the context is
        empty as well.
        """
        found = [(0.0, True)] * len(requests)
        arguments: list[Any] = [request.args for request in requests]
        asked = [
            number
            for number, (context, text) in enumerate(arguments)
            if context or self.tok_encode(text, add_special_tokens=False)
        ]
        on_terminal = self.show_progress and sys.stderr.isatty()  # its bar would fill a log file
        scored = super().loglikelihood(
            [requests[number] for number in asked], disable_tqdm or not on_terminal
        )
        for number, one in zip(asked, scored, strict=True):
            found[number] = one
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole documents, in windows as long as the context.

        The prefix token stands before the first window, so the tokenizer adds none: with both,
        every document would begin with a doubled BOS.
        """
        queries: list[Query] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, windows):
                queries.append(Query.of(context, continuation, self.max_length))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._score(queries, "windows", disable_tqdm)
        for number, (log_prob, _) in zip(owners, scores, strict=True):
            totals[number] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until a stop sequence."""
        texts = [""] * len(requests)
        with self._bar(len(requests), "generations", disable_tqdm) as bar:
            for options, numbers in _by_options(requests):
                contexts = [requests[i].args[0] for i in numbers]
                found = self._generate(contexts, options, bar, task=requests[numbers[0]].task_name)
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        found = [(0.0, True)] * len(requests)
        asked = [number for number, (_, _, cont) in enumerate(requests) if cont]
        queries = [Query.of(*requests[number][1:], self.max_length) for number in asked]
        self._report_cut(requests)
        scores = self._score(queries, "continuations", disable_tqdm)
        for number, one in zip(asked, scores, strict=True):
            found[number] = one
        return found

    def _report_cut(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> None:
        limit = self.max_length
        cut = sum(len(context) + len(cont) > limit + 1 for _, context, cont in requests)
        lost = sum(len(cont) > limit for _, _, cont in requests)
        if cut:
            logger.warning(
                "%d of %d texts exceed the context of %d tokens and are cut from the left%s",
                cut,
                len(requests),
                limit,
                f", {lost} of them inside the scored continuation" if lost else "",
            )

    def _score(
        self, queries: Sequence[Query], what: str, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        with self._bar(len(queries), what, disable_tqdm) as shown:
            return score(self.model, queries, batch_size=self.batch_size, on_progress=shown.update)

    def _bar(self, total: int, what: str, disable: bool) -> Any:
        return bar(what, total, show=self.show_progress and not disable)

    def _generate(
        self, contexts: Sequence[str], options: dict[str, Any], bar: Any, task: str | None
    ) -> list[str]:
        """Texts of one set of generation options, longest prompts first."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options, default_max_gen_toks=256))
        stop, decoding = self._decoding(kwargs, task)
        room = self.max_length - decoding.max_new_tokens
        prompts = [self.tok_encode(c)[-room:] or [self.prefix_token_id] for c in contexts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        longest = len(prompts[order[0]]) + decoding.max_new_tokens
        budget = column_budget(self.model, longest, self.batch_size)
        stopped = partial(self._has_stop, stop=stop)
        texts = [""] * len(prompts)
        while order:
            columns = len(prompts[order[0]]) + decoding.max_new_tokens
            batch = order[: max(1, budget // columns)]
            tokens = [prompts[i] for i in batch]
            work = partial(generate, self.model, tokens, decoding, stopped=stopped)
            if (found := attempt(work)) is None:
                budget = halved(budget, columns * len(batch), single=len(batch) == 1)
                continue
            for i, new in zip(batch, found, strict=True):
                texts[i] = postprocess_generated_text(self.encoder.decode(new), stop, None)
            order = order[len(batch) :]
            bar.update(len(batch))
        return texts

    def _decoding(self, kwargs: dict[str, Any], task: str | None) -> tuple[list[str], Decoding]:
        """Stop sequences and the rest of lm-eval's generation options."""
        if unknown := set(kwargs) - GENERATION_OPTIONS:
            raise ConfigError(
                f"task {task!r} asks for generation options {', '.join(sorted(unknown))}; known "
                f"are {', '.join(sorted(GENERATION_OPTIONS))} (change them with gen_kwargs)"
            )
        eos = self.encoder.decode([self.eot_token_id], skip_special=False)
        stop = [s for s in handle_stop_sequences(kwargs["until"], eos=eos) if s]
        if kwargs["max_gen_toks"] >= self.max_length:
            raise ConfigError(
                f"task {task!r} generates up to {kwargs['max_gen_toks']} tokens and the model's "
                f"context is {self.max_length}: give a smaller gen_kwargs.max_gen_toks"
            )
        return stop, Decoding(
            max_new_tokens=kwargs["max_gen_toks"],
            eos_ids=tuple(self.encoder.eos_ids),
            temperature=float(kwargs.get("temperature", 0.0)) if kwargs["do_sample"] else 0.0,
            top_k=kwargs.get("top_k"),
            top_p=float(kwargs.get("top_p", 1.0)),
            seed=self.seed,
        )

    def _has_stop(self, tokens: list[int], stop: Sequence[str]) -> bool:
        """Whether the newest tokens complete a stop sequence."""
        # a token stands for at least one byte, but decoders may eat the space before the first
        reach = max((len(s.encode()) for s in stop), default=0) + 2
        tail = self.encoder.decode(tokens[-reach:])
        return any(s in tail for s in stop)


def _by_options(requests: Sequence[Instance]) -> list[tuple[dict[str, Any], list[int]]]:
    """Numbers of the requests with equal generation options."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for number, request in enumerate(requests):
        options: Any = list(request.args)[1]
        if not isinstance(options, dict):
            raise ConfigError(f"task {request.task_name!r} has generation options {options!r}")
        for known, numbers in groups:
            if known == options:
                numbers.append(number)
                break
        else:
            groups.append((options, [number]))
    return groups
