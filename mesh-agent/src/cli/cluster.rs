//! Becoming a member: `init` makes a cluster, `token` invites, `join` accepts.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use mesh_common::config::{ClusterId, Config, ConfigError, DiscoveryServer, EditError, SecretSource, set_cluster};
use mesh_common::key::ClusterSecret;
use mesh_common::token::{JoinToken, ServerToken};
use zeroize::Zeroizing;

use super::config_file::{self, InvalidConfig};
use super::exit::UsageError;
use super::{Global, InitArgs, JoinArgs, block_on, print, token_input};
use crate::api::{ApiError, client};
use crate::durable;
use crate::secrets::{self, SecretFileError};

const NEW_CONFIG: &str = "\
# The configuration of this mesh node. `mesh-agent config show` prints every key with its value.
mesh:
  enabled: true # the one boolean: `mesh-agent up` and `down` change it
";

/// What the configuration file says before it is changed.
struct Before {
    text: String,
    /// The cluster this machine is configured for, if any.
    cluster: Option<(ClusterId, SecretSource)>,
}

pub(super) fn init(global: &Global, args: InitArgs) -> anyhow::Result<u8> {
    let before = before(global)?;
    if let Some((id, _)) = &before.cluster {
        bail!(
            "this machine is configured for cluster {id} already ({}): nothing was changed. \
             `mesh-agent token` invites another machine; `mesh-agent join --replace` changes the cluster",
            global.config.display()
        );
    }
    let secret_file = secret_file(global);
    refuse_to_overwrite(&secret_file)?;
    let servers = if args.discovery.is_empty() {
        ServerToken::parse(&token_input::read(args.file.as_deref(), "server token")?)?.servers
    } else if args.discovery.len() == args.pin.len() {
        let pairs = args.discovery.into_iter().zip(args.pin);
        pairs.map(|(endpoint, pin)| DiscoveryServer { endpoint, pin, proxied: false }).collect()
    } else {
        return Err(UsageError("each --discovery needs its own --pin".to_owned()).into());
    };
    let token = JoinToken {
        servers,
        cluster_id: args.cluster_id.map_or_else(made_up_id, Ok)?,
        secret: ClusterSecret::from_bytes(*random()?),
    };
    become_member(global, &before.text, &token, &secret_file)?;
    print(&format!(
        "made cluster {} in {} and {}\n{}to add a machine: run `mesh-agent token` here and `mesh-agent join` there\n",
        token.cluster_id,
        global.config.display(),
        secret_file.display(),
        apply(global)?
    ))
}

pub(super) fn token(global: &Global) -> anyhow::Result<u8> {
    let config = config_file::read(&global.config)?.ok_or_else(|| global.never_joined())?.config;
    let Some(cluster_id) = config.cluster.id else { return Err(global.never_joined().into()) };
    if config.discovery.is_empty() {
        bail!("{} names no discovery server, so there is none to invite others to", global.config.display());
    }
    let secret = secrets::cluster_secret(&config.cluster.secret)?;
    let text = JoinToken { servers: config.discovery, cluster_id, secret }.to_text();
    print(&Zeroizing::new(format!("{}\n", *text)))
}

pub(super) fn join(global: &Global, args: JoinArgs) -> anyhow::Result<u8> {
    let before = before(global)?;
    let token = JoinToken::parse(&token_input::read(args.file.as_deref(), "join token")?)?;
    let mut secret_file = secret_file(global);
    match &before.cluster {
        None if !args.replace => refuse_to_overwrite(&secret_file)?,
        None => {}
        Some((id, source)) => {
            match secrets::cluster_secret(source) {
                Ok(secret) if *id == token.cluster_id && secret == token.secret => {
                    return print(&format!("this machine is a member of cluster {id} already: nothing was changed\n"));
                }
                // Only the secret was lost: the same cluster gets it again.
                Err(SecretFileError::Missing { .. }) if *id == token.cluster_id => {}
                _ if args.replace => {}
                _ => bail!(
                    "this machine is configured for cluster {id}{}: nothing was changed. \
                     To leave it for the token's cluster use `mesh-agent join --replace`",
                    if *id == token.cluster_id { " with another secret" } else { "" }
                ),
            }
            if let SecretSource::File(file) = source {
                secret_file.clone_from(file);
            }
        }
    }
    become_member(global, &before.text, &token, &secret_file)?;
    print(&format!("joined cluster {}: {}\n{}", token.cluster_id, global.config.display(), apply(global)?))
}

/// Reads the configuration file as far as joining needs it: one that only lacks a cluster is no error here.
fn before(global: &Global) -> anyhow::Result<Before> {
    let Some(text) = config_file::read_text(&global.config)? else {
        return Ok(Before { text: NEW_CONFIG.to_owned(), cluster: None });
    };
    match Config::parse(&text) {
        Ok(config) => {
            let Config { cluster, .. } = config;
            Ok(Before { text, cluster: cluster.id.map(|id| (id, cluster.secret)) })
        }
        Err(errors) if errors.0.iter().all(|error| matches!(error, ConfigError::Missing { .. })) => {
            Ok(Before { text, cluster: None })
        }
        Err(errors) => Err(InvalidConfig { file: global.config.clone(), errors }.into()),
    }
}

/// Writes the secret, then the configuration that names it.
fn become_member(global: &Global, text: &str, token: &JoinToken, secret_file: &Path) -> anyhow::Result<()> {
    let edited = set_cluster(text, &token.cluster_id, secret_file, &token.servers).map_err(|error| match error {
        EditError::Invalid(errors) => anyhow::Error::new(InvalidConfig { file: global.config.clone(), errors }),
        by_hand => anyhow!("{}: {by_hand}", global.config.display()),
    })?;
    for file in [secret_file, &global.config] {
        if let Some(parent) = file.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            let made = DirBuilder::new().recursive(true).mode(0o755).create(parent);
            made.with_context(|| format!("the directory {} cannot be made", parent.display()))?;
        }
    }
    let secret = Zeroizing::new(format!("{}\n", *token.secret.to_text()));
    durable::replace(secret_file, secret.as_bytes(), 0o600)
        .with_context(|| format!("{} cannot be written", secret_file.display()))?;
    config_file::write(&global.config, &edited)
}

/// The secret stands beside the configuration.
fn secret_file(global: &Global) -> PathBuf {
    let config = std::path::absolute(&global.config).unwrap_or_else(|_| global.config.clone());
    config.with_file_name("cluster.secret")
}

fn refuse_to_overwrite(secret_file: &Path) -> anyhow::Result<()> {
    if secret_file.exists() {
        bail!(
            "{} is there already and may be the only copy of a cluster's secret: nothing was changed. Move it away first",
            secret_file.display()
        );
    }
    Ok(())
}

/// Has a running agent use the new configuration; says what happened, as a line.
fn apply(global: &Global) -> anyhow::Result<String> {
    match block_on(client::reload(&global.settings().socket))? {
        Ok(()) => Ok("the running agent applied it\n".to_owned()),
        Err(ApiError::NotRunning { .. }) => {
            Ok("next: `systemctl enable --now mesh-agent`, or `mesh-agent run` to try it\n".to_owned())
        }
        Err(error) => Ok(format!("the running agent did not apply it: {error}\n")),
    }
}

fn made_up_id() -> anyhow::Result<ClusterId> {
    let id = format!("mesh-{}", data_encoding::HEXLOWER.encode(&random()?[..4]));
    Ok(id.parse()?)
}

fn random() -> anyhow::Result<Zeroizing<[u8; 32]>> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *bytes).map_err(|error| anyhow!("the system gives no randomness: {error}"))?;
    Ok(bytes)
}
