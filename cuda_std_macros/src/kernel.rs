//! The expansion of `#[kernel]`.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{Error, FnArg, Ident, ItemFn, LitInt, Pat, Result, ReturnType, Token, Type};

/// Arguments of a launch: tuples of more have no `KernelArgs`.
const MAX_ARGUMENTS: usize = 16;

/// What stands in the attribute's parentheses.
struct Options {
    suffix: Option<Ident>,
    overlapping: bool,
    /// Threads of a block, and blocks that fit on a multiprocessor at once.
    launch_bounds: Option<(u32, u32)>,
}

impl Parse for Options {
    fn parse(input: ParseStream) -> Result<Self> {
        let mut suffix = None;
        let mut overlapping = false;
        let mut launch_bounds = None;
        while !input.is_empty() {
            let key = Ident::parse_any(input)?;
            let twice = if key == "suffix" {
                input.parse::<Token![=]>()?;
                suffix.replace(Ident::parse_any(input)?).is_some()
            } else if key == "overlapping" {
                std::mem::replace(&mut overlapping, true)
            } else if key == "launch_bounds" {
                let content;
                syn::parenthesized!(content in input);
                let threads = content.parse::<LitInt>()?.base10_parse()?;
                content.parse::<Token![,]>()?;
                let blocks = content.parse::<LitInt>()?.base10_parse()?;
                launch_bounds.replace((threads, blocks)).is_some()
            } else {
                return Err(Error::new(
                    key.span(),
                    "the options of #[kernel] are suffix = NAME, overlapping and launch_bounds(THREADS, BLOCKS)",
                ));
            };
            if twice {
                return Err(Error::new(key.span(), format!("{key} is given twice")));
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        Ok(Self { suffix, overlapping, launch_bounds })
    }
}

/// One parameter of the function, and how it travels in a launch.
struct Parameter {
    name: Ident,
    kind: Kind,
}

enum Kind {
    /// As it is.
    Value(Type),
    /// `&T`: a pointer.
    Reference(Type),
    /// `&[T]`: a pointer and a length.
    Slice(Type),
}

impl Parameter {
    fn new(argument: &FnArg) -> Result<Self> {
        let argument = match argument {
            FnArg::Typed(argument) => argument,
            FnArg::Receiver(receiver) => {
                return Err(Error::new_spanned(receiver, "a kernel is no method: it cannot take self"));
            }
        };
        let name = match &*argument.pat {
            Pat::Ident(pattern) if pattern.by_ref.is_none() && pattern.subpat.is_none() => {
                pattern.ident.clone()
            }
            pattern => return Err(Error::new_spanned(pattern, "a kernel's parameter needs a plain name")),
        };
        let kind = match &*argument.ty {
            Type::Reference(reference) if reference.mutability.is_some() => {
                return Err(Error::new_spanned(
                    reference,
                    "every thread would hold the same &mut: take a raw pointer (*mut T) and write disjoint elements",
                ));
            }
            Type::Reference(reference) => match &*reference.elem {
                Type::Slice(slice) => Kind::Slice((*slice.elem).clone()),
                element => Kind::Reference(element.clone()),
            },
            Type::ImplTrait(ty) => {
                return Err(Error::new_spanned(ty, "a kernel cannot be generic"));
            }
            ty => Kind::Value(ty.clone()),
        };
        Ok(Self { name, kind })
    }

    /// The types that a launch passes.
    fn types(&self) -> Vec<TokenStream> {
        match &self.kind {
            Kind::Value(ty) => vec![quote!(#ty)],
            Kind::Reference(ty) => vec![quote!(*const #ty)],
            Kind::Slice(ty) => vec![quote!(*const #ty), quote!(usize)],
        }
    }

    /// The names of what a launch passes.
    fn names(&self) -> Vec<String> {
        let name = self.name.unraw().to_string();
        match self.kind {
            Kind::Slice(_) => vec![name.clone(), format!("{name}_len")],
            _ => vec![name],
        }
    }

    /// The parameter again, from what a launch passes.
    fn rebuild(&self, passed: &[TokenStream]) -> TokenStream {
        match self.kind {
            Kind::Value(_) => passed[0].clone(),
            Kind::Reference(_) => {
                let pointer = &passed[0];
                quote!(&*#pointer)
            }
            Kind::Slice(_) => {
                let (pointer, length) = (&passed[0], &passed[1]);
                quote!(::core::slice::from_raw_parts(#pointer, #length))
            }
        }
    }
}

/// Refuses what cannot be a kernel, at the token that makes it so.
fn check(function: &ItemFn) -> Result<()> {
    let signature = &function.sig;
    if let Some(token) = &signature.asyncness {
        return Err(Error::new_spanned(token, "a kernel cannot be async"));
    }
    if let Some(token) = &signature.constness {
        return Err(Error::new_spanned(token, "a kernel cannot be const"));
    }
    if let Some(abi) = &signature.abi {
        return Err(Error::new_spanned(abi, "#[kernel] chooses the ABI: leave extern out"));
    }
    if signature.unsafety.is_none() {
        return Err(Error::new_spanned(
            signature.fn_token,
            "a kernel is an unsafe fn: nothing checks what a launch passes",
        ));
    }
    if !signature.generics.params.is_empty() {
        return Err(Error::new_spanned(
            &signature.generics,
            "a kernel cannot be generic: call a generic function from one kernel per instance",
        ));
    }
    if let Some(clause) = &signature.generics.where_clause {
        return Err(Error::new_spanned(clause, "a kernel cannot be generic"));
    }
    if let Some(variadic) = &signature.variadic {
        return Err(Error::new_spanned(variadic, "a kernel cannot be variadic"));
    }
    if let ReturnType::Type(_, ty) = &signature.output {
        return Err(Error::new_spanned(ty, "a kernel returns nothing: write results through a pointer"));
    }
    Ok(())
}

pub(crate) fn expand(attribute: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let options: Options = syn::parse2(attribute)?;
    let function: ItemFn = syn::parse2(item)?;
    check(&function)?;
    let parameters = function.sig.inputs.iter().map(Parameter::new).collect::<Result<Vec<_>>>()?;
    let types: Vec<TokenStream> = parameters.iter().flat_map(Parameter::types).collect();
    if types.len() > MAX_ARGUMENTS {
        return Err(Error::new_spanned(
            &function.sig.inputs,
            format!("a kernel takes at most {MAX_ARGUMENTS} arguments, here are {}", types.len()),
        ));
    }

    let base = function.sig.ident.unraw().to_string();
    let symbol = match &options.suffix {
        Some(suffix) => format!("{base}_{}", suffix.unraw()),
        None => base,
    };
    let device = device_item(&function, &parameters, &types, &symbol, options.launch_bounds);
    let host = host_items(&function, &parameters, &types, &symbol, options.overlapping);
    Ok(quote! {
        #device
        #host
    })
}

/// The PTX entry point.
fn device_item(
    function: &ItemFn,
    parameters: &[Parameter],
    types: &[TokenStream],
    symbol: &str,
    launch_bounds: Option<(u32, u32)>,
) -> TokenStream {
    let ItemFn { attrs, vis, sig, block } = function;
    // rustc has no way to say it: a comment in the assembly, which cuda_builder turns into directives.
    let bounds = launch_bounds.map(|(threads, blocks)| {
        let comment = format!("// cuda_std launch_bounds {symbol} {threads} {blocks}");
        quote!(#[cfg(target_arch = "nvptx64")] ::core::arch::global_asm!(#comment);)
    });
    let ident = &sig.ident;
    let passed: Vec<Ident> =
        (0..types.len()).map(|i| Ident::new(&format!("argument{i}"), Span::mixed_site())).collect();
    let mut rest = passed.as_slice();
    let rebuilt = parameters.iter().zip(&sig.inputs).map(|(parameter, argument)| {
        let (own, others) = rest.split_at(parameter.types().len());
        rest = others;
        let own: Vec<TokenStream> = own.iter().map(|ident| quote!(#ident)).collect();
        let value = parameter.rebuild(&own);
        quote!(let #argument = unsafe { #value };)
    });
    let rebuilt: Vec<TokenStream> = rebuilt.collect();
    quote! {
        #bounds

        #[cfg(target_arch = "nvptx64")]
        #(#attrs)*
        #[allow(unused_unsafe, improper_ctypes_definitions, clippy::too_many_arguments)]
        #[unsafe(export_name = #symbol)]
        #vis unsafe extern "ptx-kernel" fn #ident(#(#passed: #types),*) {
            #(#rebuilt)*
            #block
        }
    }
}

/// The plain function, and the handle that a launch takes.
fn host_items(
    function: &ItemFn,
    parameters: &[Parameter],
    types: &[TokenStream],
    symbol: &str,
    overlapping: bool,
) -> TokenStream {
    let ItemFn { attrs, vis, sig, block } = function;
    let ident = &sig.ident;
    let handle = format_ident!("{}", ident.unraw().to_string().to_uppercase(), span = ident.span());
    let names = parameters.iter().flat_map(Parameter::names);
    let pointers = Ident::new("pointers", Span::mixed_site());
    let mut position = 0usize;
    let arguments = parameters.iter().map(|parameter| {
        let read: Vec<TokenStream> = parameter
            .types()
            .into_iter()
            .map(|ty| {
                let i = position;
                position += 1;
                quote!((*(*#pointers.add(#i)).cast::<#ty>()))
            })
            .collect();
        parameter.rebuild(&read)
    });
    let arguments: Vec<TokenStream> = arguments.collect();
    // The handle exists under the same conditions as the function.
    let conditions = attrs.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    let doc = format!("What a launch of [`{ident}()`] takes.");
    quote! {
        #[cfg(not(target_arch = "nvptx64"))]
        #(#attrs)*
        #[allow(clippy::too_many_arguments)]
        #vis #sig #block

        #[cfg(not(target_arch = "nvptx64"))]
        #(#conditions)*
        #[doc = #doc]
        #vis static #handle: ::cuda_std::launch::Kernel<(#(#types,)*)> = {
            #[allow(unused_unsafe, unused_variables, clippy::undocumented_unsafe_blocks)]
            unsafe fn entry(#pointers: *const *mut ::core::ffi::c_void) {
                // SAFETY: the launch passes one pointer per argument, in this order and of these types.
                unsafe { #ident(#(#arguments),*) }
            }
            // SAFETY: `entry` reads exactly the types that the handle names.
            unsafe { ::cuda_std::launch::Kernel::new(#symbol, &[#(#names),*], #overlapping, entry) }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error for a kernel's source: the text it points at, and its message.
    fn error(attribute: &str, item: &str) -> (String, String) {
        let error = expand(attribute.parse().unwrap(), item.parse().unwrap()).expect_err("refused");
        (error.span().source_text().unwrap_or_default(), error.to_string())
    }

    fn expanded(attribute: &str, item: &str) -> String {
        expand(attribute.parse().unwrap(), item.parse().unwrap()).unwrap().to_string()
    }

    #[test]
    fn what_cannot_be_a_kernel_is_refused_at_its_token() {
        for (item, token, message) in [
            ("unsafe fn k<T>(x: T) {}", "<T>", "generic"),
            ("unsafe fn k<const N: usize>() {}", "<const N: usize>", "generic"),
            ("unsafe fn k(x: impl Copy) {}", "impl Copy", "generic"),
            ("async unsafe fn k() {}", "async", "async"),
            ("const unsafe fn k() {}", "const", "const"),
            ("unsafe extern \"C\" fn k() {}", "extern \"C\"", "ABI"),
            ("unsafe fn k() -> u32 { 0 }", "u32", "returns nothing"),
            ("unsafe fn k(x: &mut [f32]) {}", "&mut [f32]", "*mut T"),
            ("unsafe fn k(x: &mut f32) {}", "&mut f32", "*mut T"),
            ("unsafe fn k(&self) {}", "&self", "self"),
            ("unsafe fn k((a, b): (u32, u32)) {}", "(a, b)", "plain name"),
            ("fn k() {}", "fn", "unsafe"),
        ] {
            let (at, text) = error("", item);
            assert_eq!(at, token, "{item}");
            assert!(text.contains(message), "{item}: {text}");
        }
    }

    #[test]
    fn unknown_and_repeated_options_are_refused() {
        assert_eq!(error("prefix = a", "unsafe fn k() {}").0, "prefix");
        assert!(error("suffix = a, suffix = b", "unsafe fn k() {}").1.contains("twice"));
        assert!(error("launch_bounds(1)", "unsafe fn k() {}").1.contains("expected"));
        assert!(error("overlapping, overlapping", "unsafe fn k() {}").1.contains("twice"));
        assert!(!error("suffix", "unsafe fn k() {}").1.is_empty());
    }

    #[test]
    fn more_arguments_than_a_launch_takes_are_refused() {
        let slices = (0..8).map(|i| format!("s{i}: &[f32], ")).collect::<String>();
        assert!(expand("".parse().unwrap(), format!("unsafe fn k({slices}) {{}}").parse().unwrap()).is_ok());
        let (_, text) = error("", &format!("unsafe fn k({slices} n: u32) {{}}"));
        assert!(text.contains("at most 16") && text.contains("17"), "{text}");
    }

    #[test]
    fn a_suffix_changes_the_symbol_alone() {
        let code = expanded("suffix = q4_k", "pub unsafe fn gemv(n: u32) {}");
        assert!(code.contains("export_name = \"gemv_q4_k\""), "{code}");
        assert!(code.contains("fn gemv (") && code.contains("static GEMV :"), "{code}");
    }

    #[test]
    fn the_handle_says_whether_kernels_overlap() {
        assert!(expanded("overlapping", "unsafe fn k() {}").contains("& [] , true , entry"));
        assert!(expanded("suffix = a", "unsafe fn k() {}").contains("& [] , false , entry"));
    }

    #[test]
    fn launch_bounds_become_a_comment_in_the_assembly() {
        let code = expanded("suffix = a, launch_bounds(256, 2)", "unsafe fn k() {}");
        assert!(code.contains("\"// cuda_std launch_bounds k_a 256 2\""), "{code}");
    }

    #[test]
    fn attributes_and_documentation_are_kept() {
        let code = expanded("", "/// Adds.\n#[cfg(feature = \"x\")] pub(crate) unsafe fn add(n: u32) {}");
        assert_eq!(code.matches("Adds.").count(), 2, "{code}");
        assert_eq!(code.matches("feature = \"x\"").count(), 3, "{code}");
        assert!(code.contains("pub (crate) static ADD"), "{code}");
    }

    #[test]
    fn slices_travel_as_pointer_and_length() {
        let code = expanded("", "unsafe fn k(x: &[f32], y: &u8) {}");
        assert!(code.contains("Kernel < (* const f32 , usize , * const u8 ,) >"), "{code}");
        assert!(code.contains("[\"x\" , \"x_len\" , \"y\"]"), "{code}");
    }
}
