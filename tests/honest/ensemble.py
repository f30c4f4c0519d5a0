"""Two models, trained in turn; the mean of their logits is scored."""

import torch

import train_cuda


class Ensemble(torch.nn.Module):
    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, idx):
        return torch.stack([model(idx) for model in self.models]).mean(dim=0)


def build_model(track, platform):
    return Ensemble([train_cuda.build_model(track, platform) for _ in range(2)])


def main():
    exp = train_cuda.Experiment()
    ensemble = build_model(exp.track, exp.platform)
    steps = [train_cuda.warm_up(model, exp) for model in ensemble.models]
    exp.start(ensemble, depth=2, flops_per_token=ensemble.models[0].flops_per_token())
    step = 0
    while exp.progress < 1.0:
        exp.log(step, steps[step % 2](exp.batch, exp.progress))
        step += 1
    exp.finish(ensemble)


if __name__ == "__main__":
    main()
