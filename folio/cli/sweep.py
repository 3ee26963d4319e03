"""`python -m folio sweep`: train with many settings and report the best."""

from typing import TYPE_CHECKING, Annotated

import typer

from folio.errors import UserError

if TYPE_CHECKING:
    from folio.sweeps.plan import Plan


def sweep(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="PARAM=VALUES...", help="a,b,c or, with --random, low..high"),
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(metavar="N", help="Run N random trials instead of every combination."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for --random.")] = 1,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Trials in parallel.")] = 1,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Start from a variant in variants/.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="By default a hash of the sweep's trials."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the trials without running them.")
    ] = False,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only write the plan; `trial` then trains each trial.")
    ] = False,
    report: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only write the report of an earlier sweep.")
    ] = None,
) -> None:
    """Train with many settings and report which is best.

    Runs every combination of the values (a grid) or, with --random, N random trials. For these, a
    param may have a range such as 1e-4..1e-2, which is sampled on a log scale if its high end is at
    least ten times its low end; the prefixes log: and lin: override that. All trials are checked
    first, then queued as DVC experiments. After Ctrl-C, the same command resumes the sweep. The
    report is written to sweeps/NAME.

    Example: python -m folio sweep train.learning_rate=1e-3,2e-3,4e-3 model.n_layer=2,3 --jobs 2

    Example: python -m folio sweep --random 20 train.learning_rate=1e-4..1e-2 model.dropout=0..0.3
    """
    from folio import device, params
    from folio.runtime import RuntimeParams
    from folio.sweeps import variants
    from folio.sweeps.plan import check_trials, make_plan, make_trials, read_plan
    from folio.sweeps.sweep import failure_message, job_environment, run, save_plan

    (runtime,) = params.load(runtime=RuntimeParams)
    if report:
        _report(read_plan(report), runtime.tracking_uri)
        return
    trials = make_trials(settings or [], random, seed)
    base = variants.read(variant) if variant else {}
    check_trials(trials, base)
    plan = make_plan(trials, base, name)
    if variant:
        variants.report_uncommitted(variant, base | trials[0])
    print(plan.overview(), flush=True)
    if dry_run:
        return
    if only_plan:
        save_plan(plan)
        array = f"1-{len(trials)}" if len(trials) > 1 else "1"
        print(f"\nNext: sbatch --array={array} deploy/slurm/train.sbatch {plan.name}")
        return
    environment = job_environment(jobs, device.resolve_device(runtime.device).type)
    failed = run(plan, jobs, environment)
    _report(plan, runtime.tracking_uri)
    if failed:
        raise UserError(failure_message(plan, failed))


def _report(plan: "Plan", tracking_uri: str | None) -> None:
    from folio.sweeps.report import write_report

    path = write_report(plan, tracking_uri)
    print(f"\n{path.read_text(encoding='utf-8')}\nThis report is in {path}, next to the plot.")
