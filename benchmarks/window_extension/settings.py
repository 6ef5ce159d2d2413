"""What a config of the study says."""

import dataclasses
import pathlib
import tomllib

RUNS = pathlib.Path("runs/window_extension")
CONFIGS = pathlib.Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A regime: the student, the data, the budget, and the methods compared.

    Attributes:
        name: String, the name of the config.
        description: String, one sentence.
        methods: List of names in `methods.METHODS` and `methods.UNTRAINED`.
        ablation: List of names in `methods.METHODS`: LAid with stretching, and
            with a part left out or changed.
        labelled: Integer, training questions with their answer.
        unlabelled: Integer, further training questions without. Methods that
            have a teacher use them too; the others cannot. Where `labelled` is
            0, methods without a teacher are given all answers to these.
        sizes: List of integers, images in a training haystack.
        steps: Integer, training steps of every method.
        batch_size: Integer, questions a step, of every method.
        labelled_in_batch: Integer, how many of them have labels where there
            are both kinds. Defaults to half.
        learning_rates: List of floats, tried for every method.
        tuned_as: String, the name of another config whose choice of learning
            rates is taken. Defaults to `None`: each method tries them here.
        tuned_methods: Dictionary from a method to another whose learning rate
            it takes: a variant to what it varies.
        prior_steps: Integer, supervised steps on `prior_sizes` images that the
            student has behind it before any method starts. Defaults to 0: the
            embedded student.
        prior_sizes: List of integers.
        measured_at: List of integers, steps of training after which students
            are measured too. After the last step all are.
        measured_sizes: List of integers, images in the haystacks that are
            measured on the way. Defaults to all sizes.
        student: String, the name in `keras_laid.presets` of the student that
            every method starts from.
    """

    name: str
    description: str
    methods: list
    labelled: int
    sizes: list
    ablation: tuple = ()
    unlabelled: int = 0
    steps: int = 500
    batch_size: int = 40
    labelled_in_batch: int | None = None
    learning_rates: tuple = (7e-4, 1.5e-3)
    tuned_as: str | None = None
    tuned_methods: dict = dataclasses.field(default_factory=dict)
    prior_steps: int = 0
    prior_sizes: tuple = ()
    measured_at: tuple = ()
    measured_sizes: tuple = ()
    student: str = "STUDENT"


def read_settings(name):
    path = CONFIGS / f"{name}.toml"
    return Settings(name=name, **tomllib.loads(path.read_text()))


def names_of_configs():
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))
