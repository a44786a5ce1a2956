"""What is asked of a dataset, and types that its configuration shares with its description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Task = Literal["zero_shot", "retrieval", "selection", "association"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
