"""The distiller's steps on TensorFlow."""

import tensorflow as tf


class Steps:
    def train_step(self, data):
        batch = self.unpack(data)
        # Outside the tape, so that nothing is kept for a backward pass.
        targets = self.run_teacher(batch[0])
        with tf.GradientTape() as tape:
            y_pred, terms = self.compute_terms(*batch, targets, training=True)
            loss = self.optimizer.scale_loss(terms["loss"])
        variables = self.trainable_weights
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return self.update_metrics(*batch, y_pred, terms)

    def test_step(self, data):
        batch = self.unpack(data)
        targets = self.run_teacher(batch[0])
        y_pred, terms = self.compute_terms(*batch, targets, training=False)
        return self.update_metrics(*batch, y_pred, terms)
