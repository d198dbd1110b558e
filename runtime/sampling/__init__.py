"""What to generate: the parameters of a request, and the choice of every sequence's next token in one batch."""

from llmopt.runtime.sampling.constraints import ConstraintCompiler, Constraints
from llmopt.runtime.sampling.logprobs import TokenLogprobs, token_logprobs
from llmopt.runtime.sampling.params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from llmopt.runtime.sampling.sampler import Sampled, Sampler
from llmopt.runtime.sampling.state import SamplingState

__all__ = [
    "ConstraintCompiler",
    "Constraints",
    "RequestOutputKind",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "SamplingState",
    "StructuredOutputsParams",
    "TokenLogprobs",
    "token_logprobs",
]
