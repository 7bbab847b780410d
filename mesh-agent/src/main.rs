//! `mesh-agent`: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_agent::cli::main()
}
