"""The distiller's steps on JAX: pure functions of the state they are given."""

import contextlib
from typing import Any

import jax
import keras

from keras_laid.backbones.decoder import check_values


class Steps:
    def train_step(self, state, data):
        variables, fixed, optimizer_variables, metrics_variables = state
        batch = self.unpack(data)
        # Outside the differentiated function, so that nothing is kept for a
        # backward pass.
        with self.scope(variables, fixed):
            targets = self.run_teacher(batch[0])

        def compute_loss(variables):
            with self.scope(variables, fixed, optimizer_variables) as scope:
                y_pred, terms = self.compute_terms(
                    *batch, targets, training=True
                )
                loss = self.optimizer.scale_loss(terms["loss"])
            new = new_values(scope, self.non_trainable_variables)
            return loss, (y_pred, terms, new)

        gradient = jax.grad(compute_loss, has_aux=True)
        gradients, (y_pred, terms, fixed) = gradient(variables)
        variables, optimizer_variables = self.optimizer.stateless_apply(
            optimizer_variables, gradients, variables
        )
        logs, metrics_variables = self.stateless_metrics(
            metrics_variables, batch, y_pred, terms
        )
        return logs, (variables, fixed, optimizer_variables, metrics_variables)

    def test_step(self, state, data):
        variables, fixed, metrics_variables = state
        batch = self.unpack(data)
        with self.scope(variables, fixed) as scope:
            targets = self.run_teacher(batch[0])
            y_pred, terms = self.compute_terms(*batch, targets, training=False)
        fixed = new_values(scope, self.non_trainable_variables)
        logs, metrics_variables = self.stateless_metrics(
            metrics_variables, batch, y_pred, terms
        )
        return logs, (variables, fixed, metrics_variables)

    # Keras takes the values out of the variables before a step, and leaves
    # them empty, the teacher's too, if the step raises an error. These methods
    # put the values back.

    def make_train_function(self, force: bool = False) -> None:
        before = self.train_function
        super().make_train_function(force)
        if self.train_function is not before:
            self.train_function = self.restoring(self.train_function)

    def make_test_function(self, force: bool = False) -> None:
        before = self.test_function
        super().make_test_function(force)
        if self.test_function is not before:
            self.test_function = self.restoring(self.test_function)

    def make_predict_function(self, force=False):
        before = self.predict_function
        super().make_predict_function(force)
        if self.predict_function is not before:
            self.predict_function = self.restoring(self.predict_function)
        return self.predict_function

    # If reading the data raises an error, Keras still has the state after the
    # last step, and `jax_state_sync` puts it into the variables.

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        check_values(self.student)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.jax_state_sync()

    def predict(self, *args, **kwargs):
        check_values(self.student)
        try:
            return super().predict(*args, **kwargs)
        finally:
            self.jax_state_sync()

    def restoring(self, function):
        """Wraps a step, to put its state into the variables if it raises."""

        def run(state, data):
            with contextlib.ExitStack() as stack:
                stack.callback(self.give_back, state)
                outputs = function(state, data)
                stack.pop_all()
            return outputs

        return run

    def give_back(self, state):
        """Puts the values of a state into the variables."""
        variables, fixed, *others = state
        groups = [
            (self.trainable_variables, variables),
            (self.non_trainable_variables, fixed),
        ]
        if others:
            groups.append((self.metrics_variables, others.pop()))
        if others:
            groups.append((self.optimizer.variables, others.pop()))
        for targets, values in groups:
            for target, value in zip(targets, values, strict=True):
                target.assign(value)

    def scope(self, variables, fixed, optimizer_variables=()):
        """A scope in which Keras variables have the values of a state."""
        optimizer = self.optimizer.variables if optimizer_variables else ()
        mapping = [
            *zip(self.trainable_variables, variables, strict=True),
            *zip(self.non_trainable_variables, fixed, strict=True),
            *zip(optimizer, optimizer_variables, strict=True),
        ]
        return keras.StatelessScope(state_mapping=mapping, collect_losses=True)

    def stateless_metrics(self, metrics_variables, batch, y_pred, terms):
        mapping = zip(self.metrics_variables, metrics_variables, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            logs = self.update_metrics(*batch, y_pred, terms)
        return logs, new_values(scope, self.metrics_variables)


def new_values(scope, variables):
    """The values that variables have at the end of a scope."""
    values = (scope.get_current_value(v) for v in variables)
    return [
        variable.value if value is None else value
        for variable, value in zip(variables, values, strict=True)
    ]
