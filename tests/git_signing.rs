//! git signs commits and tags with a key that only the agent has, and verifies them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::fs;

use support::{Outcome, agent::Agent, keygen, public_key, run, with_suffix};

#[test]
fn git_signs_and_verifies() {
    let agent = Agent::start();
    for (n, options) in [["-t", "ed25519"], ["-t", "rsa"], ["-t", "ecdsa"], ["-t", "ed25519-sk"]].iter().enumerate() {
        let key = keygen(agent.dir(), &format!("user_{n}"), options);
        agent.add(&key, &[]);
        fs::remove_file(&key).unwrap();
        let allowed = agent.dir().join("allowed_signers");
        let public = fs::read_to_string(with_suffix(&key, ".pub")).unwrap();
        fs::write(&allowed, format!("somebody@example.org {public}")).unwrap();

        let repository = agent.dir().join(format!("repository_{n}"));
        fs::create_dir(&repository).unwrap();
        let git = |args: &[&str]| -> Outcome {
            let signing_key = format!("user.signingKey={}.pub", key.display());
            let signers = format!("gpg.ssh.allowedSignersFile={}", allowed.display());
            let mut git = agent.command("git");
            for setting in [
                &signing_key,
                &signers,
                "gpg.format=ssh",
                "user.name=Somebody",
                "user.email=somebody@example.org",
                "init.defaultBranch=main",
            ] {
                git.args(["-c", setting]);
            }
            run(git.current_dir(&repository).args(args))
        };
        git(&["init", "-q"]).ok();
        git(&["commit", "-q", "-S", "--allow-empty", "-m", "signed"]).ok();
        let verified = git(&["verify-commit", "HEAD"]);
        assert!(verified.stderr.contains("Good \"git\" signature for somebody@example.org"), "{verified:?}");
        verified.ok();
        git(&["tag", "-s", "-m", "signed", "v1"]).ok();
        git(&["verify-tag", "v1"]).ok();

        git(&["commit", "-q", "--no-gpg-sign", "--allow-empty", "-m", "unsigned"]).ok();
        assert_ne!(git(&["verify-commit", "HEAD"]).code, Some(0));

        // Without the key in the agent there is no signature, and no commit either.
        run(agent.command("ssh-add").arg("-d").arg(with_suffix(&key, ".pub"))).ok();
        assert_ne!(git(&["commit", "-q", "-S", "--allow-empty", "-m", "no key"]).code, Some(0));
        assert!(!agent.ssh_add(&["-L"]).stdout.contains(&public_key(&key)));
    }
}
