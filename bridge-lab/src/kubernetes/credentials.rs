//! Who is who: a certificate authority, tokens and kubeconfigs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{ADDRESS, PORT};

/// Who asks the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// May do everything.
    Admin,
    /// The agent of a node.
    Node,
    /// The agent of a LAN host.
    Host,
}

impl User {
    const ALL: [Self; 3] = [Self::Admin, Self::Node, Self::Host];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Node => "bridge-agent",
            Self::Host => "bridge-lan-host",
        }
    }

    /// As the API server knows them: agents are the service accounts of deploy/kubernetes, with their rights and no others.
    pub(super) fn account(self) -> String {
        match self {
            Self::Admin => self.name().to_owned(),
            Self::Node | Self::Host => format!("system:serviceaccount:bridge-system:{}", self.name()),
        }
    }

    const fn groups(self) -> &'static str {
        match self {
            Self::Admin => "system:masters",
            Self::Node | Self::Host => "system:serviceaccounts,system:serviceaccounts:bridge-system",
        }
    }

    fn token_file(self, directory: &Path) -> PathBuf {
        directory.join(format!("{}.token", self.name()))
    }
}

pub(super) fn kubeconfig(directory: &Path, user: User) -> PathBuf {
    directory.join(format!("{}.kubeconfig", user.name()))
}

pub(super) fn token(directory: &Path, user: User) -> Result<String> {
    fs::read_to_string(user.token_file(directory)).context("read a token")
}

/// Certificates, tokens and kubeconfigs.
pub(super) fn write(directory: &Path) -> Result<()> {
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    let ca = ["req", "-x509", "-subj", "/CN=lab-ca", "-keyout", "ca.key", "-out", "ca.crt"];
    openssl(directory, &[&ca[..], &key].concat())?;
    let request = ["req", "-subj", "/CN=kube-apiserver", "-keyout", "server.key", "-out", "server.csr"];
    openssl(directory, &[&request[..], &key[..5]].concat())?;
    let names = format!("subjectAltName=IP:{ADDRESS},IP:127.0.0.1\nextendedKeyUsage=serverAuth\n");
    fs::write(directory.join("server.ext"), names)?;
    let sign = ["x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"];
    let sign_out = ["-days", "2", "-extfile", "server.ext", "-out", "server.crt"];
    openssl(directory, &[&sign[..], &sign_out].concat())?;
    for user in User::ALL {
        fs::write(user.token_file(directory), format!("{}-1", user.name()))?;
        let file = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
             clusters: [{{name: lab, cluster: {{server: 'https://{ADDRESS}:{PORT}', certificate-authority: {ca}}}}}]\n\
             users: [{{name: {name}, user: {{tokenFile: {token}}}}}]\n\
             contexts: [{{name: lab, context: {{cluster: lab, user: {name}, namespace: bridge-system}}}}]\n",
            ca = directory.join("ca.crt").display(),
            name = user.name(),
            token = user.token_file(directory).display(),
        );
        fs::write(kubeconfig(directory, user), file)?;
    }
    write_tokens(directory)
}

/// Another token for `user`, the old one is worth nothing from the API server's next start on.
pub(super) fn rotate(directory: &Path, user: User) -> Result<()> {
    replace(directory, user, &format!("{}x", token(directory, user)?))?;
    write_tokens(directory)
}

/// Puts `token` in the place of that of `user`, in one step.
pub(super) fn replace(directory: &Path, user: User, token: &str) -> Result<()> {
    let new = directory.join("new.token");
    fs::write(&new, token)?;
    fs::rename(new, user.token_file(directory)).context("replace a token")
}

/// What the API server writes down: what agents ask.
pub(super) fn audit_policy() -> String {
    let accounts = [User::Node, User::Host].map(User::account).join(", ");
    format!(
        "apiVersion: audit.k8s.io/v1\nkind: Policy\n\
         rules:\n- {{level: Metadata, users: [{accounts}]}}\n- {{level: None}}\n"
    )
}

fn write_tokens(directory: &Path) -> Result<()> {
    let mut lines = String::new();
    for user in User::ALL {
        let (token, account, groups) = (token(directory, user)?, user.account(), user.groups());
        lines += &format!("{token},{account},{},\"{groups}\"\n", user.name());
    }
    fs::write(directory.join("tokens.csv"), lines).context("write the tokens")
}

fn openssl(directory: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).current_dir(directory).output();
    let output = output.context("start openssl (is it installed?)")?;
    ensure!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
