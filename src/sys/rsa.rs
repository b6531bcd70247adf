//! RSA on aws-lc's C interface. aws-lc-rs covers neither SHA-1 signatures, nor signatures without a DigestInfo, nor keys
//! below 2048 or above 8192 bits, and takes no key in the six integers that SSH sends; we need them all.
#![allow(unsafe_code)]

use std::{fmt, ptr, ptr::NonNull, slice};

use aws_lc_sys as lc;
use zeroize::Zeroizing;

use crate::devices::Hash;

/// The six integers of an SSH RSA private key, as magnitudes.
pub struct RsaIntegers<'a> {
    /// Modulus.
    pub n: &'a [u8],
    /// Public exponent.
    pub e: &'a [u8],
    /// Private exponent.
    pub d: &'a [u8],
    /// Inverse of `q` modulo `p`.
    pub iqmp: &'a [u8],
    /// First prime.
    pub p: &'a [u8],
    /// Second prime.
    pub q: &'a [u8],
}

/// The object of either half of a key. aws-lc wipes its memory when it is dropped.
struct Rsa(NonNull<lc::RSA>);

// SAFETY: an RSA object has no thread affinity, and aws-lc documents that operations on one object may run on several
// threads at once (its blinding and Montgomery caches are locked inside). We never mutate it after creation.
unsafe impl Send for Rsa {}
// SAFETY: as above.
unsafe impl Sync for Rsa {}

impl Drop for Rsa {
    fn drop(&mut self) {
        // SAFETY: the pointer came from aws-lc, is owned by us alone and is not used again.
        unsafe { lc::RSA_free(self.0.as_ptr()) }
    }
}

impl Rsa {
    fn as_ptr(&self) -> *mut lc::RSA {
        self.0.as_ptr()
    }

    /// The modulus's length in bytes, which is that of every signature and ciphertext.
    fn size(&self) -> usize {
        // SAFETY: the key is live.
        unsafe { lc::RSA_size(self.as_ptr()) as usize }
    }
}

fn nid(hash: Hash) -> i32 {
    match hash {
        Hash::Sha1 => lc::NID_sha1,
        Hash::Sha256 => lc::NID_sha256,
        Hash::Sha384 => lc::NID_sha384,
        Hash::Sha512 => lc::NID_sha512,
    }
}

fn md(hash: Hash) -> *const lc::EVP_MD {
    // SAFETY: no preconditions; each returns a pointer to a static object.
    unsafe {
        match hash {
            Hash::Sha1 => lc::EVP_sha1(),
            Hash::Sha256 => lc::EVP_sha256(),
            Hash::Sha384 => lc::EVP_sha384(),
            Hash::Sha512 => lc::EVP_sha512(),
        }
    }
}

/// For PSS: a salt as long as the digest.
const SALT_IS_DIGEST_LEN: i32 = -1;

/// An RSA public key.
pub struct RsaPublicKey(Rsa);

impl RsaPublicKey {
    /// A key from the magnitudes of its modulus and exponent; `None` when aws-lc takes no such key.
    pub fn new(n: &[u8], e: &[u8]) -> Option<Self> {
        let (n, e) = (Bn::from_bytes(n)?, Bn::from_bytes(e)?);
        // SAFETY: both are live big numbers, which aws-lc copies.
        NonNull::new(unsafe { lc::RSA_new_public_key(n.0.as_ptr(), e.0.as_ptr()) }).map(|key| Self(Rsa(key)))
    }

    /// Whether this is an RSASSA-PKCS1-v1_5 signature over a digest of `hash`'s length (RFC 8017, 8.2).
    pub fn verify_pkcs1v15(&self, hash: Hash, digest: &[u8], signature: &[u8]) -> bool {
        // SAFETY: both slices are described by pointer and length; the key is live and not changed.
        let good = unsafe {
            lc::RSA_verify(
                nid(hash),
                digest.as_ptr(),
                digest.len(),
                signature.as_ptr(),
                signature.len(),
                self.0.as_ptr(),
            )
        };
        good == 1
    }

    /// Whether this is EMSA-PKCS1-v1_5's padding around `data` itself, with no DigestInfo, signed.
    pub fn verify_pkcs1v15_raw(&self, data: &[u8], signature: &[u8]) -> bool {
        let mut found = vec![0; self.0.size()];
        let mut len = 0;
        // SAFETY: `found` has RSA_size bytes as aws-lc requires, `signature` is described by pointer and length, and the
        // key is live and not changed.
        let good = unsafe {
            lc::RSA_verify_raw(
                self.0.as_ptr(),
                &raw mut len,
                found.as_mut_ptr(),
                found.len(),
                signature.as_ptr(),
                signature.len(),
                lc::RSA_PKCS1_PADDING,
            )
        };
        good == 1 && found.get(..len) == Some(data)
    }

    /// Whether this is an RSASSA-PSS signature over a digest of `hash`'s length, with MGF1 of the same hash and a salt as
    /// long as the digest (RFC 8017, 8.1).
    pub fn verify_pss(&self, hash: Hash, digest: &[u8], signature: &[u8]) -> bool {
        if digest.len() != hash.digest_len() {
            return false;
        }
        // SAFETY: `digest` is as long as the hash makes them, which aws-lc requires; `signature` is described by pointer
        // and length; the key is live and not changed.
        let good = unsafe {
            lc::RSA_verify_pss_mgf1(
                self.0.as_ptr(),
                digest.as_ptr(),
                digest.len(),
                md(hash),
                md(hash),
                SALT_IS_DIGEST_LEN,
                signature.as_ptr(),
                signature.len(),
            )
        };
        good == 1
    }
}

/// An RSA private key, parsed and checked.
pub struct RsaKey(Rsa);

impl fmt::Debug for RsaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RsaKey(…)")
    }
}

/// A big number that is wiped when it is dropped.
struct Bn(NonNull<lc::BIGNUM>);

impl Bn {
    fn new() -> Option<Self> {
        // SAFETY: no preconditions; null is handled.
        NonNull::new(unsafe { lc::BN_new() }).map(Self)
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        // SAFETY: pointer and length describe `bytes`; a null target makes aws-lc allocate.
        NonNull::new(unsafe { lc::BN_bin2bn(bytes.as_ptr(), bytes.len(), ptr::null_mut()) }).map(Self)
    }

    /// `self mod (prime - 1)`: a CRT exponent.
    fn modulo_minus_one(&self, prime: &Bn) -> Option<Self> {
        let result = Bn::new()?;
        // SAFETY: all pointers are live big numbers of ours; the copy and the context are freed below.
        unsafe {
            let less_one = Bn(NonNull::new(lc::BN_dup(prime.0.as_ptr()))?);
            let ctx = NonNull::new(lc::BN_CTX_new())?;
            let done = lc::BN_sub_word(less_one.0.as_ptr(), 1) == 1
                && lc::BN_div(ptr::null_mut(), result.0.as_ptr(), self.0.as_ptr(), less_one.0.as_ptr(), ctx.as_ptr())
                    == 1;
            lc::BN_CTX_free(ctx.as_ptr());
            done.then_some(result)
        }
    }
}

impl Drop for Bn {
    fn drop(&mut self) {
        // SAFETY: owned by us alone and not used again.
        unsafe { lc::BN_clear_free(self.0.as_ptr()) }
    }
}

impl RsaKey {
    /// Builds a key from SSH's integers; `None` when they do not belong together.
    pub fn from_integers(key: &RsaIntegers<'_>) -> Option<Self> {
        // No private value is longer than the modulus: a bound on the work that a peer can ask for.
        let bound = key.n.len();
        if [key.d, key.iqmp, key.p, key.q].iter().any(|v| v.len() > bound || v.is_empty()) {
            return None;
        }
        let [n, e, d, iqmp, p, q] = [key.n, key.e, key.d, key.iqmp, key.p, key.q].map(Bn::from_bytes);
        let (n, e, d, iqmp, p, q) = (n?, e?, d?, iqmp?, p?, q?);
        let (dmp1, dmq1) = (d.modulo_minus_one(&p)?, d.modulo_minus_one(&q)?);
        // SAFETY: all eight are live big numbers, which aws-lc copies.
        let rsa = NonNull::new(unsafe {
            lc::RSA_new_private_key(
                n.0.as_ptr(),
                e.0.as_ptr(),
                d.0.as_ptr(),
                p.0.as_ptr(),
                q.0.as_ptr(),
                dmp1.0.as_ptr(),
                dmq1.0.as_ptr(),
                iqmp.0.as_ptr(),
            )
        })?;
        Self(Rsa(rsa)).checked()
    }

    /// A new key with so many bits and the public exponent 65537: the pairwise test included, some seconds' work for 4,096.
    pub fn generate(bits: u32) -> Option<Self> {
        let e = Bn::from_bytes(&[1, 0, 1])?;
        // SAFETY: no preconditions.
        let key = Self(Rsa(NonNull::new(unsafe { lc::RSA_new() })?));
        // SAFETY: the key is live and ours alone; `e` is a live number, which aws-lc copies; no callback.
        let made =
            unsafe { lc::RSA_generate_key_ex(key.0.as_ptr(), bits.cast_signed(), e.0.as_ptr(), ptr::null_mut()) == 1 };
        made.then_some(key)
    }

    /// Reads what [`RsaKey::to_der`] wrote: an RSAPrivateKey of RFC 8017, A.1.2.
    pub fn from_der(der: &[u8]) -> Option<Self> {
        // SAFETY: pointer and length describe `der`.
        let rsa = NonNull::new(unsafe { lc::RSA_private_key_from_bytes(der.as_ptr(), der.len()) })?;
        Self(Rsa(rsa)).checked()
    }

    fn checked(self) -> Option<Self> {
        // SAFETY: the key is live. The check leaves an error in aws-lc's per-thread queue, which nobody reads.
        let good = unsafe { lc::RSA_check_key(self.0.as_ptr()) == 1 };
        if !good {
            // SAFETY: no preconditions.
            unsafe { lc::ERR_clear_error() }
        }
        good.then_some(self)
    }

    /// The key as an RSAPrivateKey of RFC 8017, A.1.2.
    pub fn to_der(&self) -> Option<Zeroizing<Vec<u8>>> {
        let (mut out, mut len) = (ptr::null_mut(), 0);
        // SAFETY: both out-pointers are valid; on success aws-lc hands over a buffer of `len` bytes, which
        // OPENSSL_free wipes and frees.
        unsafe {
            if lc::RSA_private_key_to_bytes(&raw mut out, &raw mut len, self.0.as_ptr()) != 1 {
                return None;
            }
            let der = Zeroizing::new(slice::from_raw_parts(out, len).to_vec());
            lc::OPENSSL_free(out.cast());
            Some(der)
        }
    }

    /// The modulus's length in bytes, which is that of every signature and ciphertext.
    pub fn size(&self) -> usize {
        self.0.size()
    }

    /// RSASSA-PKCS1-v1_5 over a digest of `hash`'s length (RFC 8017, 8.2).
    pub fn sign_digest(&self, hash: Hash, digest: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; self.size()];
        let mut len = 0;
        // SAFETY: `digest` is described by pointer and length, `out` has RSA_size bytes as aws-lc requires, and the
        // key is not changed by signing although the C signature takes it as mutable.
        let done = unsafe {
            lc::RSA_sign(nid(hash), digest.as_ptr(), digest.len(), out.as_mut_ptr(), &raw mut len, self.0.as_ptr())
        };
        (done == 1 && len as usize == out.len()).then_some(out)
    }

    /// EMSA-PKCS1-v1_5's padding around `data` itself, with no DigestInfo, signed. `None` when `data` is less than 11
    /// bytes shorter than the modulus.
    pub fn sign_raw(&self, data: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; self.size()];
        let mut len = 0;
        // SAFETY: as in `sign_digest`.
        let done = unsafe {
            lc::RSA_sign_raw(
                self.0.as_ptr(),
                &raw mut len,
                out.as_mut_ptr(),
                out.len(),
                data.as_ptr(),
                data.len(),
                lc::RSA_PKCS1_PADDING,
            )
        };
        (done == 1 && len == out.len()).then_some(out)
    }

    /// RSASSA-PSS over a digest of `hash`'s length, with MGF1 of the same hash and a salt as long as the digest
    /// (RFC 8017, 8.1). `None` when the modulus is too short for them.
    pub fn sign_pss(&self, hash: Hash, digest: &[u8]) -> Option<Vec<u8>> {
        if digest.len() != hash.digest_len() {
            return None;
        }
        let mut out = vec![0; self.size()];
        let mut len = 0;
        // SAFETY: `digest` is as long as the hash makes them; for the rest as in `sign_digest`.
        let done = unsafe {
            lc::RSA_sign_pss_mgf1(
                self.0.as_ptr(),
                &raw mut len,
                out.as_mut_ptr(),
                out.len(),
                digest.as_ptr(),
                digest.len(),
                md(hash),
                md(hash),
                SALT_IS_DIGEST_LEN,
            )
        };
        (done == 1 && len == out.len()).then_some(out)
    }

    /// RSADP (RFC 8017, 5.1.2): what was encrypted, with its padding, as long as the modulus. `None` when the ciphertext
    /// is of another length, no number below the modulus, or one that is its own plaintext (0, 1 and the modulus less 1).
    pub fn decrypt_raw(&self, ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let mut out = Zeroizing::new(vec![0; self.size()]);
        let mut len = 0;
        // SAFETY: `ciphertext` is described by pointer and length, `out` has RSA_size bytes as aws-lc requires, and the
        // key is not changed.
        let done = unsafe {
            lc::RSA_decrypt(
                self.0.as_ptr(),
                &raw mut len,
                out.as_mut_ptr(),
                out.len(),
                ciphertext.as_ptr(),
                ciphertext.len(),
                lc::RSA_NO_PADDING,
            )
        };
        (done == 1 && len == out.len()).then_some(out)
    }

    /// RSAES-OAEP with MGF1 of the same hash (RFC 8017, 7.1.2). `None` when the ciphertext was not made for this key, hash
    /// and label.
    pub fn decrypt_oaep(&self, hash: Hash, label: &[u8], ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let mut out = Zeroizing::new(vec![0; self.size()]);
        let mut len = out.len();
        let context = DecryptContext::new(&self.0)?;
        // SAFETY: the context is live. The label is a copy in aws-lc's memory, which the context owns once it has taken
        // it and which we free when it has not. `ciphertext` is described by pointer and length, and `out` has the
        // RSA_size bytes that are the longest result.
        let done = unsafe {
            let set = lc::EVP_PKEY_CTX_set_rsa_padding(context.0.as_ptr(), lc::RSA_PKCS1_OAEP_PADDING) == 1
                && lc::EVP_PKEY_CTX_set_rsa_oaep_md(context.0.as_ptr(), md(hash)) == 1;
            if !set {
                return None;
            }
            if !label.is_empty() {
                let copy = NonNull::new(lc::OPENSSL_memdup(label.as_ptr().cast(), label.len()))?;
                if lc::EVP_PKEY_CTX_set0_rsa_oaep_label(context.0.as_ptr(), copy.as_ptr().cast(), label.len()) != 1 {
                    lc::OPENSSL_free(copy.as_ptr());
                    return None;
                }
            }
            lc::EVP_PKEY_decrypt(
                context.0.as_ptr(),
                out.as_mut_ptr(),
                &raw mut len,
                ciphertext.as_ptr(),
                ciphertext.len(),
            )
        };
        (done == 1).then(|| {
            out.truncate(len);
            out
        })
    }

    /// Gives the six integers to `take`, as magnitudes without leading zeros. They are wiped afterwards.
    pub fn with_integers<T>(&self, take: impl FnOnce(&RsaIntegers<'_>) -> T) -> Option<T> {
        let rsa = self.0.as_ptr();
        // SAFETY: the key is live; it owns what these return, for as long as it lives.
        let integers = unsafe {
            [
                lc::RSA_get0_n(rsa),
                lc::RSA_get0_e(rsa),
                lc::RSA_get0_d(rsa),
                lc::RSA_get0_iqmp(rsa),
                lc::RSA_get0_p(rsa),
                lc::RSA_get0_q(rsa),
            ]
        };
        let size = self.size();
        let mut out = Zeroizing::new(vec![0; 6 * size]);
        for (integer, out) in integers.into_iter().zip(out.chunks_mut(size)) {
            // SAFETY: a number of the live key, or null, which is not asked for its digits; `out` is described by pointer
            // and length.
            let done = !integer.is_null() && unsafe { lc::BN_bn2bin_padded(out.as_mut_ptr(), out.len(), integer) } == 1;
            if !done {
                return None;
            }
        }
        let mut parts = out.chunks(size).map(|bytes| {
            let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
            &bytes[zeros..]
        });
        let mut next = || parts.next().unwrap_or_default();
        Some(take(&RsaIntegers { n: next(), e: next(), d: next(), iqmp: next(), p: next(), q: next() }))
    }

    /// The private exponent, as long as the modulus.
    pub fn private_exponent(&self) -> Option<Zeroizing<Vec<u8>>> {
        // SAFETY: the key is live; it owns what this returns, for as long as it lives.
        self.padded(unsafe { lc::RSA_get0_d(self.0.as_ptr()) })
    }

    /// The private exponent modulo `p` - 1, and modulo `q` - 1, each as long as the modulus.
    pub fn crt_exponents(&self) -> Option<[Zeroizing<Vec<u8>>; 2]> {
        // SAFETY: as above.
        let (dmp1, dmq1) = unsafe { (lc::RSA_get0_dmp1(self.0.as_ptr()), lc::RSA_get0_dmq1(self.0.as_ptr())) };
        Some([self.padded(dmp1)?, self.padded(dmq1)?])
    }

    /// A number of this key, or null, as long as the modulus.
    fn padded(&self, integer: *const lc::BIGNUM) -> Option<Zeroizing<Vec<u8>>> {
        let mut out = Zeroizing::new(vec![0; self.size()]);
        // SAFETY: a number of the live key, or null, which is not asked for its digits; `out` is described by pointer and
        // length.
        let done = !integer.is_null() && unsafe { lc::BN_bn2bin_padded(out.as_mut_ptr(), out.len(), integer) } == 1;
        done.then_some(out)
    }
}

/// What aws-lc wants for a decryption with parameters.
struct DecryptContext(NonNull<lc::EVP_PKEY_CTX>);

impl DecryptContext {
    fn new(key: &Rsa) -> Option<Self> {
        // SAFETY: the key is live, and both objects that refer to it hold references of their own, which are given back:
        // the first here, the second by `drop`.
        unsafe {
            let holder = NonNull::new(lc::EVP_PKEY_new())?;
            let set = lc::EVP_PKEY_set1_RSA(holder.as_ptr(), key.as_ptr()) == 1;
            let context = NonNull::new(lc::EVP_PKEY_CTX_new(holder.as_ptr(), ptr::null_mut())).map(Self);
            lc::EVP_PKEY_free(holder.as_ptr());
            context.filter(|context| set && lc::EVP_PKEY_decrypt_init(context.0.as_ptr()) == 1)
        }
    }
}

impl Drop for DecryptContext {
    fn drop(&mut self) {
        // SAFETY: owned by us alone and not used again.
        unsafe { lc::EVP_PKEY_CTX_free(self.0.as_ptr()) }
    }
}
