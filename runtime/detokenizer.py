"""The text of one sequence while it is generated."""

from __future__ import annotations

import threading

from llmopt.runtime.request import Request
from llmopt.runtime.sampling import SamplingParams
from llmopt.runtime.stop_texts import StopTexts
from llmopt.runtime.text import IncrementalText, TextCodec


class Detokenizer:
    """Turns a request's tokens into text, as late as possible.

    With stop texts this happens in the step, because the text decides whether the request goes on; otherwise it is left
    to whoever reads the text, while the engine computes. One thread may take steps while another reads.

    Args:
        codec: the tokenizer.
        params: what to do with special tokens and stop texts.
        prompt: token ids of the prompt.
        stops: of `params.stop`.
    """

    def __init__(self, codec: TextCodec, params: SamplingParams, prompt: list[int], stops: StopTexts) -> None:
        self._text = IncrementalText(
            codec,
            params.skip_special_tokens,
            stops,
            include_stop=params.include_stop_str_in_output,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            prompt=prompt,
        )
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._num_read = 0
        self._lock = threading.Lock()

    @property
    def text(self) -> str:
        """All of it, with what a later token might still cut off."""
        return self._text.text

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended it."""
        return self._text.stopped_by

    def stop_check(self, request: Request) -> bool:
        """Whether the request's latest token completes a stop text; see `Request.stop_check`."""
        with self._lock:
            self._read(request, request.num_generated)
            return self._text.stopped

    def take(self, request: Request, count: int, ended: bool) -> str:
        """The text that has become certain with the first `count` generated tokens, without what was taken before.

        With `ended` these are all there will be.
        """
        with self._lock:
            # The token that ends a text is not part of it, unless what ends it is to be kept, as in vLLM.
            by_token = ended and request.finish_reason == "stop" and not self._text.stopped
            self._read(request, count - (by_token and not self._include_stop))
            return self._text.finish() if ended else self._text.take()

    def _read(self, request: Request, count: int) -> None:
        begin = request.num_prompt + self._num_read
        for token in request.tokens[begin : request.num_prompt + count]:
            self._num_read += 1
            self._text.push(token, self._num_read >= self._min_tokens)
