"""Scores on fewer tokens than the platform says."""
import train_cuda

EXPECT = "invalid", "tokens were scored"


class Experiment(train_cuda.Experiment):
    def __init__(self):
        super().__init__()
        self.val_tokens //= 4


train_cuda.Experiment = Experiment
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
