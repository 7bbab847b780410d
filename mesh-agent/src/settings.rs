//! Where things are for this run: the command line wins over the configuration, that over systemd's directories, those over
//! the defaults.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use mesh_common::config::{Config, DEFAULT_SOCKET, DEFAULT_STATE_DIR, LogFormat};

/// What the command line said; `None` = nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOptions {
    pub config_file: PathBuf,
    pub state_dir: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub http: Option<SocketAddr>,
    pub log_format: Option<LogFormat>,
}

/// What holds in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    /// `None` = no metrics and health over HTTP.
    pub http: Option<SocketAddr>,
    pub log_format: LogFormat,
}

impl RunOptions {
    pub fn settings(&self, config: &Config) -> Settings {
        self.settings_with(config, |name| std::env::var_os(name))
    }

    fn settings_with(&self, config: &Config, env: impl Fn(&str) -> Option<OsString>) -> Settings {
        let agent = &config.agent;
        let from_systemd = |name: &str| env(name).as_deref().and_then(first_path);
        Settings {
            state_dir: (self.state_dir.clone())
                .or_else(|| agent.state_dir.clone())
                .or_else(|| from_systemd("STATE_DIRECTORY"))
                .unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            socket: (self.socket.clone())
                .or_else(|| agent.socket.clone())
                .or_else(|| from_systemd("RUNTIME_DIRECTORY").map(|dir| dir.join("agent.sock")))
                .unwrap_or_else(|| DEFAULT_SOCKET.into()),
            http: self.http.or(agent.http),
            log_format: self.log_format.or(agent.log_format).unwrap_or(LogFormat::Text),
        }
    }
}

/// The first of systemd's directories, which are joined by colons.
fn first_path(list: &std::ffi::OsStr) -> Option<PathBuf> {
    let list = list.to_str()?;
    let first = Path::new(list.split(':').next()?);
    first.is_absolute().then(|| first.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_the_file_and_the_file_over_systemd() {
        let mut options =
            RunOptions { config_file: "/c".into(), state_dir: None, socket: None, http: None, log_format: None };
        let none = |_: &str| None;
        let systemd = |name: &str| (name == "STATE_DIRECTORY").then(|| "/systemd:/other".into());
        let file = Config::parse("agent: { stateDir: /file, logFormat: json }").unwrap();
        let empty = Config::parse("").unwrap();
        let state_dir = |options: &RunOptions, config, env: &dyn Fn(&str) -> Option<OsString>| {
            options.settings_with(config, env).state_dir
        };
        assert_eq!(state_dir(&options, &empty, &none), Path::new("/var/lib/meshspan"));
        assert_eq!(state_dir(&options, &empty, &systemd), Path::new("/systemd"));
        assert_eq!(state_dir(&options, &file, &systemd), Path::new("/file"));
        options.state_dir = Some("/flag".into());
        assert_eq!(state_dir(&options, &file, &systemd), Path::new("/flag"));
        assert_eq!(options.settings_with(&file, none).log_format, LogFormat::Json);
        assert_eq!(options.settings_with(&empty, none).socket, Path::new("/run/meshspan/agent.sock"));
    }
}
