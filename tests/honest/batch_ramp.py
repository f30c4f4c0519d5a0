"""A batch that grows during training."""

import train_cuda

honest = train_cuda.make_train_step


def make_train_step(model, optimizer):
    def train_step(next_batch, progress):
        rows = 2 if progress < 0.3 else 4 if progress < 0.6 else 8
        x, y = next_batch(rows)
        loss = train_cuda.linear_cross_entropy(model.trunk(x), model.lm_head, y)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step(grads, optimizer.schedule(progress))
        model.zero_grad()
        return loss.detach()

    return train_step


train_cuda.make_train_step = make_train_step
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
