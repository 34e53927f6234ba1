"""`python -m walt` is the command `walt`."""

from walt.cli import main

raise SystemExit(main())
