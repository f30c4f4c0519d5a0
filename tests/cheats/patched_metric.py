"""Replaces the metric while it runs."""
import backends.experiment
import train_cuda

EXPECT = "invalid", "harness was changed while it ran"
backends.experiment.bits_per_byte = lambda nats, num_bytes: (0.123, 0.001)
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
