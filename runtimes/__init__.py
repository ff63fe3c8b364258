"""Runtimes: each knows how to run a model. None knows tenants, quotas or the HTTP server in front.

A Spec is a runtime's configuration, and `Spec.build(site)` makes the runtime; `kind` in the config tells them apart.
Importing this package imports none of the libraries that run models.
"""

import os

from runtimes.echo import Echo
from runtimes.onnx import Onnx
from runtimes.remote import Remote
from runtimes.triton import Triton
from runtimes.vllm import Vllm

# Else ONNX Runtime, from 1.29 on, tells its makers over the network about every process and every model that it loads;
# what it reads is the environment at the time it is loaded (its docs/Privacy.md).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Spec = Echo | Onnx | Triton | Vllm | Remote
