"""How much of the variance of the loss each param explains, computed by Optuna."""

from types import ModuleType
from typing import Any

from folio.sweeps import markdown
from folio.sweeps.space import SEED, Trial, is_log_scale

MIN_TRIALS = 10


def section(trials: list[Trial], losses: list[float]) -> str:
    """A table of the params and their importance, or a sentence explaining why there is none."""
    if len(trials) < MIN_TRIALS:
        return f"Omitted: it needs at least {MIN_TRIALS} trials, and {len(trials)} have finished."
    try:
        import optuna
    except ImportError:
        return "Omitted: Optuna is not installed. Run `make sweep`, then the same command again."
    shares = _importances(optuna, trials, losses)
    rows = [[name.partition(".")[2], f"{share:.2f}"] for name, share in shares.items()]
    return (
        f"{markdown.table(['param', 'importance'], rows)}\n\nThe share of the variance of the loss"
        " over these trials that a random forest attributes to each param alone (functional ANOVA,"
        " Hutter, Hoos and Leyton-Brown 2014, computed by Optuna). It applies only to the values"
        f" tried here, and with {len(trials)} trials only the top rank is reliable."
    )


def _importances(optuna: ModuleType, trials: list[Trial], losses: list[float]) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: _distribution(optuna, name, [t[name] for t in trials]) for name in trials[0]}
    study = optuna.create_study(direction="minimize")
    for trial, loss in zip(trials, losses, strict=True):
        study.add_trial(optuna.trial.create_trial(params=trial, distributions=space, value=loss))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _distribution(optuna: ModuleType, name: str, values: list[Any]) -> Any:
    """An Optuna distribution that could have produced these values of a param."""
    types = {type(value) for value in values}
    if name == SEED or not types <= {int, float} or len(set(values)) == 1:
        return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
    if types == {int}:
        distribution = optuna.distributions.IntDistribution
    else:
        distribution = optuna.distributions.FloatDistribution
    return distribution(min(values), max(values), log=is_log_scale(values))
