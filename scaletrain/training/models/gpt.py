"""A small GPT: a transformer that predicts the next token (GPT-2 has 124,439,808 parameters)."""

from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from scaletrain.errors import UserError


class Block(nn.Module):
    """Attention to the tokens before, and two full layers, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, states: Tensor) -> Tensor:
        """(n, length, width) -> (n, length, width)."""
        states = states + self._attention(self.norm1(states))
        return states + self.layers(self.norm2(states))

    def _attention(self, states: Tensor) -> Tensor:
        n, length, width = states.shape
        # (3, n, heads, length, width / heads)
        parts = self.attend(states).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )
        return self.project(seen.transpose(1, 2).reshape(n, length, width))


class GPT(nn.Module):
    """Blocks between an embedding and the same embedding as the output layer.

    Source: A. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section
    2.3.
    """

    def __init__(
        self, kinds: int, length: int, width: int, layers: int, heads: int, dropout: float
    ):
        super().__init__()
        self.tokens = nn.Embedding(kinds, width)
        self.places = nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, length) int64 -> (n, kinds, length) logits of the next token at each place."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        states = self.drop(self.tokens(tokens) + self.places(places))
        states = self.norm(self.blocks(states))
        return (states @ self.tokens.weight.T).transpose(1, 2)


def model(
    *,
    kinds: Annotated[int, Ge(2)] = 97,
    length: Annotated[int, Ge(1)] = 64,
    width: Annotated[int, Ge(1)] = 64,
    layers: Annotated[int, Ge(1)] = 2,
    heads: Annotated[int, Ge(1)] = 4,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
) -> nn.Module:
    """Return the network.

    Args:
        kinds: of tokens; 97 are the characters of the data ``topics``.
        length: of the longest sequence.
        width: numbers for each token, a multiple of ``heads``.
        layers: blocks of attention.
        heads: of the attention.
        dropout: the part of the states that is left out in training.

    Raises:
        UserError: the width is not a multiple of the heads.
    """
    if width % heads:
        raise UserError(f"model.width: {width} is not allowed (allowed: a multiple of {heads})")
    return GPT(kinds, length, width, layers, heads, dropout)
