//! `mesh-bench`: see `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_bench::cli::main()
}
