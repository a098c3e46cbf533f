"""A model for MLServer that takes as long for one row as for many.

It runs in MLServer's environment, from a copy in the model's folder, and knows nothing of this project. One call at a
time: as with a network on a processor, what computes can do nothing else. `count` beside it tells how many batches it
has computed until now, and how many rows.
"""

import os
import pathlib
import struct
import time

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

HERE = pathlib.Path(__file__).resolve().parent
COUNT = "<qq"


class SlowModel(MLModel):  # type: ignore[misc]  # not installed where types are checked
    """Answers each row with its double."""

    async def load(self) -> bool:
        """See MLModel."""
        self._latency_s = self.settings.parameters.extra["latency_s"]
        self._batches = 0
        self._rows = 0
        self._count = os.open(HERE / "count", os.O_RDWR | os.O_CREAT)
        self._tell()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """See MLModel."""
        rows = NumpyCodec.decode_input(payload.inputs[0])
        time.sleep(self._latency_s)  # noqa: ASYNC251 -- computing does not let others run either
        self._batches += 1
        self._rows += len(rows)
        self._tell()
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", 2 * rows)])

    def _tell(self) -> None:
        os.pwrite(self._count, struct.pack(COUNT, self._batches, self._rows), 0)
