"""The distiller's steps on JAX: pure functions of the state they are given."""

import jax
import keras


class Steps:
    def train_step(self, state, data):
        variables, fixed, optimizer_variables, metrics_variables = state
        batch = keras.utils.unpack_x_y_sample_weight(data)
        # Outside the differentiated function: nothing of it is kept.
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
        batch = keras.utils.unpack_x_y_sample_weight(data)
        with self.scope(variables, fixed) as scope:
            targets = self.run_teacher(batch[0])
            y_pred, terms = self.compute_terms(*batch, targets, training=False)
        fixed = new_values(scope, self.non_trainable_variables)
        logs, metrics_variables = self.stateless_metrics(
            metrics_variables, batch, y_pred, terms
        )
        return logs, (variables, fixed, metrics_variables)

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
    """The values variables have at the end of a scope."""
    values = (scope.get_current_value(v) for v in variables)
    return [
        variable.value if value is None else value
        for variable, value in zip(variables, values, strict=True)
    ]
