version: str
built_with_torch: str
compiler: str
cpu_capabilities: list[str]
cuda_architectures: list[str]
cuda_summary: str

def cpu_capability() -> str: ...
