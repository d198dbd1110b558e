"""The vocabulary as it stands in graphs. Importing this module declares every `llmopt::` op to PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from llmopt.compiler import attention_ops as attention_ops
from llmopt.compiler import lora_op as lora_op
from llmopt.compiler import ops as ops

llmopt_ops: Any = torch.ops.llmopt
