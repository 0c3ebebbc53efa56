from typing import TypedDict

class Build(TypedDict):
    version: str
    compiler: str
    isas: list[str]
    torch: str

class Cpu(TypedDict):
    vendor: str
    model: str
    family: int
    model_number: int
    features: list[str]
    isas: list[str]
    threads: int

def build() -> Build: ...
def cpu() -> Cpu: ...
def peak_fp32(threads: int | None = None, seconds: float = 0.5) -> float: ...
def peak_bf16(threads: int | None = None, seconds: float = 0.5) -> float | None: ...
def copy_bandwidth(threads: int | None = None, bytes: int = ..., seconds: float = 0.5) -> float: ...
