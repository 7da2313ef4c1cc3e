"""What the installed scripts call: Ctrl-C and SIGTERM are minded before anything else is imported."""

from ease_common.interrupts import end_now, install

install(end_now)


def ease_train() -> None:
    """The script of that name."""
    from ease_train.cli import main

    main()


def ease_export() -> None:
    """The script of that name."""
    from ease_export.cli import main

    main()


def ease_run() -> None:
    """The script of that name."""
    from ease_runtime.cli.main import main

    main()


def ease_eval() -> None:
    """The script of that name."""
    from ease_eval.cli.main import main

    main()
