"""`python -m flashmla_cute` is `flashmla-cute`."""

from .cli import main

raise SystemExit(main())
