"""A wrapper that divides the logits by a temperature."""

import torch

import train_cuda


class Tempered(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.temperature = torch.nn.Parameter(torch.tensor(1.1))

    def forward(self, idx):
        return self.model(idx) / self.temperature


def build_model(track, platform):
    return Tempered(train_cuda.build_model(track, platform))


def main():
    exp = train_cuda.Experiment()
    model = build_model(exp.track, exp.platform)
    train_step = train_cuda.warm_up(model.model, exp)
    exp.start(model, depth=2, flops_per_token=model.model.flops_per_token())
    step = 0
    while exp.progress < 1.0:
        exp.log(step, train_step(exp.batch, exp.progress))
        step += 1
    exp.finish(model)


if __name__ == "__main__":
    main()
