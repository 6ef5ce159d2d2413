"""The settings in a config of the study."""

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
        ablation: List of names in `methods.METHODS`: a method, and variants of
            it with a part left out or changed.
        labelled: Integer, training questions with their answers.
        unlabelled: Integer, further training questions without their answers.
            Methods with a teacher use them too; the others cannot. Where
            `labelled` is 0, methods without a teacher train on these questions
            with their answers.
        sizes: List of integers, images in a training haystack.
        steps: Integer, training steps of every method.
        batch_size: Integer, questions in a batch, for every method.
        labelled_in_batch: Integer, questions with labels in a batch where both
            kinds are used. Defaults to half.
        learning_rates: List of floats, tried for every method.
        tuned_as: String, the name of another config whose chosen learning rates
            are used. Defaults to `None`: learning rates are tuned in this
            config.
        tuned_methods: Dictionary from a variant to the method whose learning
            rate it uses.
        prior_steps: Integer, supervised steps on haystacks of `prior_sizes`
            images that the student is trained for before any method starts.
            Defaults to 0: methods start from the embedded student.
        prior_sizes: List of integers, images in a haystack of the prior steps.
        measured_at: List of integers, numbers of steps after which students are
            measured during training. All are measured after the last step.
        measured_sizes: List of integers, images in the haystacks measured after
            the steps of `measured_at`. Defaults to all sizes.
        student: String, the name in `keras_laid.presets` of the student that
            every method starts from.
        teacher: String, the name in `keras_laid.presets` of the teacher.
        teacher_steps: Integer, supervised steps on haystacks of `teacher_sizes`
            images that the teacher is trained for beforehand. Defaults to 0:
            the embedded model is the teacher.
        teacher_sizes: List of integers, images in a haystack of these steps.
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
    teacher: str = "TEACHER"
    teacher_steps: int = 0
    teacher_sizes: tuple = ()


def read_settings(name):
    path = CONFIGS / f"{name}.toml"
    return Settings(name=name, **tomllib.loads(path.read_text()))


def names_of_configs():
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))
