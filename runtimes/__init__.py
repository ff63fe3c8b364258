"""Runtimes: each knows how to run a model. None knows tenants, quotas or the HTTP server in front.

A Spec is a runtime's configuration, and `Spec.build(site)` makes the runtime; `kind` in the config tells them apart.
Importing this package imports none of the libraries that run models.
"""

from runtimes.echo import Echo
from runtimes.onnx import Onnx
from runtimes.remote import Remote
from runtimes.triton import Triton
from runtimes.vllm import Vllm

Spec = Echo | Onnx | Triton | Vllm | Remote
