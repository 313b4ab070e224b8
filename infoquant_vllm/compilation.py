"""How torch.compile may treat a model of 4-bit codes."""

from vllm.config import CompilationMode, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

logger = init_logger("vllm.infoquant")


def keep_eager_arithmetic() -> None:
    """On the CPU, let torch.compile trace the model that is being built, but run torch's own kernels.

    Inductor's fused norms and activations skip roundings to bf16 and sum in another order. Last
    bits that differ become other 4-bit codes, and the codes of later layers follow: log-probabilities
    moved by 1.0 on average. What costs time here is inside operations that inductor does not see.
    """
    compilation = get_current_vllm_config().compilation_config
    if not current_platform.is_cpu() or compilation.mode == CompilationMode.NONE or compilation.backend == "eager":
        return
    compilation.backend = "eager"
    compilation.custom_ops = ["all" if choice == "none" else choice for choice in compilation.custom_ops]
    logger.info("infoquant: torch.compile traces the model and runs its graph with eager kernels")
