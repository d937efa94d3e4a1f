"""``python -m trainer`` is the command ``trainer``."""

from trainer.commands.main import main

raise SystemExit(main())
