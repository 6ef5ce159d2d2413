"""The distiller's steps on PyTorch."""

import torch


class Steps:
    def train_step(self, data):
        batch = self.unpack(data)
        with torch.no_grad():
            targets = self.run_teacher(batch[0])
        y_pred, terms = self.compute_terms(*batch, targets, training=True)
        self.zero_grad()
        self.optimizer.scale_loss(terms["loss"]).backward()
        variables = self.trainable_weights
        gradients = [variable.value.grad for variable in variables]
        with torch.no_grad():
            self.optimizer.apply(gradients, variables)
        return self.update_metrics(*batch, y_pred, terms)

    def test_step(self, data):
        batch = self.unpack(data)
        targets = self.run_teacher(batch[0])
        y_pred, terms = self.compute_terms(*batch, targets, training=False)
        return self.update_metrics(*batch, y_pred, terms)
