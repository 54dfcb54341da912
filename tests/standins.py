"""Stand-ins for classes that exist only as code on the hub: the same module paths, and what they do to a batch.

ProGen2 and Evo look to the left only; gLM2 looks both ways, and takes padding out before its blocks.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

WIDTH, DEPTH = 16, 3


class StandInConfig(PretrainedConfig):
    model_type = "stand-in"


class Block(nn.Module):
    """Every token sees the mean of those before it (causal), or of all of its sequence."""

    def __init__(self, causal, single):
        super().__init__()
        self.dense, self.causal, self.single = nn.Linear(WIDTH, WIDTH), causal, single

    def forward(self, x, lengths=None):
        if lengths is not None:
            context = torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in x.split(lengths)])
        elif self.causal:
            context = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        else:
            context = x.mean(1, keepdim=True)
        x = x + torch.tanh(self.dense(x + context))
        return x if self.single else (x, None)


class Stack(nn.Module):
    def __init__(self, name, causal, single):
        super().__init__()
        self.name = name
        self.add_module(name, nn.ModuleList([Block(causal, single) for _ in range(DEPTH)]))

    def forward(self, x, mask=None):
        lengths = None
        if mask is not None and not mask.all():
            x, lengths = x[mask], mask.sum(1).tolist()
        for block in getattr(self, self.name):
            x = block(x, lengths)
            x = x[0] if isinstance(x, tuple) else x
        return x


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(256, WIDTH)
        self.build()
        self.post_init()

    def _init_weights(self, module):
        pass


class ProGenForCausalLM(StandIn):
    def build(self):
        self.transformer = Stack("h", causal=True, single=False)

    def forward(self, input_ids):
        return self.transformer(self.tok_embeddings(input_ids))


class StripedHyenaModelForCausalLM(StandIn):
    def build(self):
        self.backbone = Stack("blocks", causal=True, single=False)

    def forward(self, input_ids):
        return self.backbone(self.tok_embeddings(input_ids))


class gLM2Model(StandIn):
    def build(self):
        self.encoder = Stack("layers", causal=False, single=True)

    def forward(self, input_ids, attention_mask=None):
        return self.encoder(self.tok_embeddings(input_ids), attention_mask)
