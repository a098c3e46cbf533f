"""A model for MLServer, where it runs from copies; it knows nothing of this project. Doubles its input.

It computes while there is a file `gate` beside it, else waits for that file. 13 is a number that it cannot bear. Asked
for nothing in particular it answers `y`, as scikit-learn's runtime answers `predict`; it has `z`, too.
"""

import asyncio
import pathlib

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

HERE = pathlib.Path(__file__).resolve().parent
LOOK_S = 0.01
FACTORS = {"y": 2, "z": 3}


class GatedModel(MLModel):  # type: ignore[misc]  # not installed where types are checked
    """See above."""

    async def load(self) -> bool:
        """Nothing to be loaded."""
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """See MLModel."""
        while not (HERE / "gate").exists():  # noqa: ASYNC110 -- told by another process
            await asyncio.sleep(LOOK_S)
        rows = NumpyCodec.decode_input(payload.inputs[0])
        if (rows == 13).any():
            raise ValueError("cannot bear 13")
        wanted = [output.name for output in payload.outputs or []] or ["y"]
        outputs = [NumpyCodec.encode_output(name, FACTORS[name] * rows) for name in wanted]
        return InferenceResponse(model_name=self.name, outputs=outputs)
