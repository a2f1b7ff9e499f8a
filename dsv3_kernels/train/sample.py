"""Text from a trained model, by one full forward a byte."""

import torch

from dsv3_kernels.model import DeepSeekV3


@torch.no_grad()
def sample(
    model: DeepSeekV3, prompt: bytes, length: int, *, context: int, temperature: float, seed: int
) -> bytes:
    """Continues the prompt by `length` bytes, each drawn at the temperature from the last `context` ones."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    tokens = list(prompt) or [0]
    for _ in range(length):
        logits = model(torch.tensor([tokens[-context:]]))[0, -1, :256]
        probabilities = (logits / temperature).softmax(-1)
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(tokens)
