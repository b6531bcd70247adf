//! Changes to the configuration file that leave a person's comments, order and spacing as they are. Knows the file's form;
//! opens no device.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use toml_edit::{ArrayOfTables, DocumentMut, InlineTable, Item, Table, value};

use super::{Config, ConfigError, Fault, System, read};
use crate::vault::pins::PinSource;

/// A configuration file that is being changed. Nothing is written before [`Editor::save`].
pub struct Editor {
    path: PathBuf,
    document: DocumentMut,
    config: Config,
}

/// A `[[device]]` for a PKCS#11 token.
#[derive(Clone, Debug)]
pub struct Pkcs11Entry {
    /// The device's name.
    pub name: String,
    /// The module's path.
    pub module: PathBuf,
    /// The token's URI.
    pub token: String,
    /// Where its PIN comes from.
    pub pin: PinSource,
    /// Variables of its process.
    pub env: Vec<(String, String)>,
}

impl Editor {
    /// Opens this file, or the one at the default place. One that is not there yet is empty.
    pub fn open(file: Option<PathBuf>) -> Result<Self, ConfigError> {
        let system = System::read();
        let path = file.or_else(|| system.default_file()).ok_or(ConfigError::NoPlace)?;
        // The file itself is replaced, not a link to it.
        let path = fs::canonicalize(&path).unwrap_or(path);
        let text = match read(&path) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let config = Config::parse(&text, &system).map_err(|fault| fault.at(&path, &text))?;
        let document = text.parse().map_err(|e: toml_edit::TomlError| {
            Fault { span: e.span(), message: e.message().to_owned() }.at(&path, &text)
        })?;
        Ok(Self { path, document, config })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it said when it was opened.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Puts a device behind the others, and returns its lines.
    pub fn add_pkcs11(&mut self, entry: &Pkcs11Entry) -> String {
        let mut table = Table::new();
        table.insert("name", value(&entry.name));
        table.insert("driver", value("pkcs11"));
        table.insert("module", value(entry.module.display().to_string()));
        table.insert("token", value(&entry.token));
        let mut pin = InlineTable::new();
        match &entry.pin {
            PinSource::Prompt => pin.insert("prompt", true.into()),
            PinSource::File(path) => pin.insert("file", path.display().to_string().into()),
            PinSource::Credential(name) => pin.insert("credential", name.into()),
        };
        table.insert("pin", value(pin));
        if !entry.env.is_empty() {
            let env: InlineTable = entry.env.iter().map(|(name, value)| (name, value)).collect();
            table.insert("env", value(env));
        }
        let lines = format!("[[device]]\n{table}");
        if !self.document.is_empty() {
            table.decor_mut().set_prefix("\n");
        }
        let devices = self.document.entry("device").or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
        match devices.as_array_of_tables_mut() {
            Some(devices) => devices.push(table),
            // `device = []`: nobody writes it.
            None => *devices = Item::ArrayOfTables([table].into_iter().collect()),
        }
        lines
    }

    /// Takes a device out, with the comment right above it; returns its lines. `None` when there is none of this name.
    pub fn remove_device(&mut self, name: &str) -> Option<String> {
        let devices = self.document.get_mut("device")?.as_array_of_tables_mut()?;
        let at = devices.iter().position(|table| table.get("name").and_then(Item::as_str) == Some(name))?;
        let table = devices.get(at)?.clone();
        devices.remove(at);
        // What stands above a blank line is about more than this device.
        let above = table.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default();
        let kept = above.rfind("\n\n").map_or("", |end| &above[..=end]).to_owned();
        if !kept.trim().is_empty() {
            self.keep_above(at, &kept);
        }
        Some(format!("[[device]]\n{}", table.to_string().trim_start()))
    }

    /// Puts comments where the device number `at` was.
    fn keep_above(&mut self, at: usize, comments: &str) {
        let next =
            self.document.get_mut("device").and_then(Item::as_array_of_tables_mut).and_then(|all| all.get_mut(at));
        match next {
            Some(next) => {
                let own = next.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default();
                let both = format!("{comments}{own}");
                next.decor_mut().set_prefix(both);
            }
            None => {
                let own = self.document.trailing().as_str().unwrap_or_default();
                let both = format!("{comments}{own}");
                self.document.set_trailing(both);
            }
        }
    }

    /// Writes the file, whole or not at all, if it is a valid one.
    pub fn save(&self) -> Result<(), ConfigError> {
        let text = self.document.to_string();
        Config::parse(&text, &System::read()).map_err(|fault| fault.at(&self.path, &text))?;
        replace(&self.path, text.as_bytes()).map_err(|source| ConfigError::Write { path: self.path.clone(), source })
    }
}

/// Puts a new file in the place of one that may be there, with the rights that it had.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = directory.join(name);
    let written = (|| {
        let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&new)?;
        match fs::metadata(path) {
            Ok(old) => file.set_permissions(old.permissions())?,
            Err(_) => file.set_permissions(fs::Permissions::from_mode(0o600))?,
        }
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn entry(name: &str) -> Pkcs11Entry {
        Pkcs11Entry {
            name: name.to_owned(),
            module: "/usr/lib/module.so".into(),
            token: "pkcs11:token=vault".to_owned(),
            pin: PinSource::Prompt,
            env: vec![("SOFTHSM2_CONF".to_owned(), "/etc/softhsm2.conf".to_owned())],
        }
    }

    const ENTRY: &str = "[[device]]\nname = \"hsm\"\ndriver = \"pkcs11\"\nmodule = \"/usr/lib/module.so\"\n\
        token = \"pkcs11:token=vault\"\npin = { prompt = true }\nenv = { SOFTHSM2_CONF = \"/etc/softhsm2.conf\" }\n";

    fn file(dir: &TempDir, text: &str) -> PathBuf {
        let path = dir.path().join("config.toml");
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn what_is_added_is_taken_out_again_and_the_rest_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let text =
            "# My settings.\n[agent]   # odd  spacing\ndefault_lifetime='9h'\n\n[log]\nlevel = \"warn\"\n# The end.\n";
        let path = file(&dir, text);
        let mut editor = Editor::open(Some(path.clone())).unwrap();
        assert_eq!(editor.add_pkcs11(&entry("hsm")), ENTRY);
        editor.save().unwrap();
        let written = fs::read_to_string(&path).unwrap();
        assert!(written.starts_with(text.trim_end_matches("# The end.\n")), "{written}");
        assert!(written.contains(&format!("\n{ENTRY}")) && written.contains("# The end."), "{written}");

        let mut editor = Editor::open(Some(path.clone())).unwrap();
        assert_eq!(editor.config().devices.len(), 1);
        assert_eq!(editor.remove_device("other"), None);
        assert_eq!(editor.remove_device("hsm").as_deref(), Some(ENTRY));
        editor.save().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn a_comment_goes_with_its_device_and_one_that_stands_apart_stays() {
        let dir = tempfile::tempdir().unwrap();
        let other = ENTRY.replace("\"hsm\"", "\"other\"");
        let path =
            file(&dir, &format!("# Both are in the cellar.\n\n# The good one.\n{ENTRY}\n# The old one.\n{other}"));
        let mut editor = Editor::open(Some(path.clone())).unwrap();
        editor.remove_device("hsm").unwrap();
        editor.save().unwrap();
        let left = fs::read_to_string(&path).unwrap();
        assert_eq!(left, format!("# Both are in the cellar.\n\n# The old one.\n{other}"));
        let mut editor = Editor::open(Some(path.clone())).unwrap();
        editor.remove_device("other").unwrap();
        editor.save().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "# Both are in the cellar.\n");
    }

    #[test]
    fn a_file_is_made_for_its_owner_and_keeps_the_rights_that_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/config.toml");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let mut editor = Editor::open(Some(path.clone())).unwrap();
        editor.add_pkcs11(&entry("hsm"));
        editor.save().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), ENTRY);
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let link = dir.path().join("link.toml");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut editor = Editor::open(Some(link.clone())).unwrap();
        editor.add_pkcs11(&entry("second"));
        editor.save().unwrap();
        assert_eq!(mode(&path), 0o640);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&link).unwrap(), format!("{ENTRY}\n{}", ENTRY.replace("\"hsm\"", "\"second\"")));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left there");
    }

    #[test]
    fn nothing_is_written_that_would_not_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, ENTRY);
        let mut editor = Editor::open(Some(path.clone())).unwrap();
        editor.add_pkcs11(&entry("hsm"));
        assert!(editor.save().unwrap_err().to_string().contains("another device's name already"));
        assert_eq!(fs::read_to_string(&path).unwrap(), ENTRY);
        fs::write(&path, "[agent\n").unwrap();
        assert!(matches!(Editor::open(Some(path)), Err(ConfigError::Invalid { line: 1, .. })));
    }
}
