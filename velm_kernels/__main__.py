from velm_kernels.cli import main

raise SystemExit(main())
