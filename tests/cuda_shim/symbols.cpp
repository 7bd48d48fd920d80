// Sizes of the kernels' static shared memory, read from a library's symbols.
#include <dlfcn.h>
#include <elf.h>

#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "runtime.h"

namespace cuda_shim {
namespace {

struct Symbols {
  std::map<uintptr_t, std::string> functions;  // by address, from the library's begin
  std::map<std::string, size_t> variables;     // bytes of thread-local variables by name

  explicit Symbols(const char* file) {
    std::ifstream stream(file, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), {});
    const auto at = [&](size_t offset) { return bytes.data() + offset; };
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(at(0));
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(at(header->e_shoff));
    for (int i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const char* names = at(sections[sections[i].sh_link].sh_offset);
      const auto* symbol = reinterpret_cast<const Elf64_Sym*>(at(sections[i].sh_offset));
      for (size_t n = sections[i].sh_size / sizeof *symbol; n > 0; --n, ++symbol) {
        const int type = ELF64_ST_TYPE(symbol->st_info);
        if (type == STT_FUNC) functions[symbol->st_value] = names + symbol->st_name;
        if (type == STT_TLS) variables[names + symbol->st_name] = symbol->st_size;
      }
    }
    if (functions.empty()) fail(std::string(file) + " has no symbols");
  }
};

size_t count_static_bytes(const void* kernel) {
  static std::map<std::string, Symbols> libraries;
  Dl_info library;
  if (dladdr(kernel, &library) == 0) fail("a kernel of no library");
  const Symbols& symbols =
      libraries.try_emplace(library.dli_fname, library.dli_fname).first->second;
  const auto address =
      reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
  // A local variable's mangled name is that of its function, _Z<name>, as in _ZZ<name>E<variable>.
  const std::string prefix = "_ZZ" + symbols.functions.at(address).substr(2) + "E";
  size_t total = 0;
  for (auto it = symbols.variables.lower_bound(prefix);
       it != symbols.variables.end() && it->first.compare(0, prefix.size(), prefix) == 0; ++it) {
    total += (it->second + 7) / 8 * 8;
  }
  return total;
}

}  // namespace

size_t static_shared_bytes(const void* kernel) {
  static std::map<const void*, size_t> known;
  const auto found = known.find(kernel);
  if (found != known.end()) return found->second;
  return known[kernel] = count_static_bytes(kernel);
}

}  // namespace cuda_shim
