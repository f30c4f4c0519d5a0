"""torch.optim.swa_utils.AveragedModel: an average of the weights is scored."""

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import train_cuda


class Averaged(AveragedModel):
    """The average, with the model that is trained beside it."""

    def __init__(self, model):
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def build_model(track, platform):
    return Averaged(train_cuda.build_model(track, platform))


def main():
    exp = train_cuda.Experiment()
    averaged = build_model(exp.track, exp.platform)
    model = train_cuda.build_model(exp.track, exp.platform)
    model.load_state_dict(averaged.module.state_dict())
    train_step = train_cuda.warm_up(model, exp)
    exp.start(averaged, depth=2, flops_per_token=model.flops_per_token())
    step = 0
    while exp.progress < 1.0:
        exp.log(step, train_step(exp.batch, exp.progress))
        averaged.update_parameters(model)
        step += 1
    exp.finish(averaged)


if __name__ == "__main__":
    main()
